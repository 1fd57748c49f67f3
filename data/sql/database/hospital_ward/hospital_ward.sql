-- The wards of a small hospital: doctors, rooms, patients and what they are given. Salaries and prices in pounds, doses in milligrams.

CREATE TABLE Doctor (
  Doctor_ID INTEGER PRIMARY KEY,
  Name TEXT NOT NULL,
  Specialty TEXT NOT NULL,
  Salary INTEGER NOT NULL,
  Start_Year INTEGER NOT NULL
);
INSERT INTO Doctor VALUES
  (1, 'Helena Marsh', 'cardiology', 98000, 2008),
  (2, 'Faisal Qureshi', 'surgery', 121000, 2011),
  (3, 'Bronwen Pugh', 'geriatrics', 87500, 2015),
  (4, 'Anton Reisz', 'neurology', 104500, 2005),
  (5, 'Chiamaka Obi', 'surgery', 93000, 2019),
  (6, 'Julien Tessier', 'pulmonology', 91000, 2017),
  (7, 'Margit Lund', 'cardiology', 84000, 2021),
  (8, 'Desmond Clay', 'geriatrics', 79500, 2022);

CREATE TABLE Room (
  Room_Number INTEGER PRIMARY KEY,
  Floor INTEGER NOT NULL,
  Beds INTEGER NOT NULL,
  Type TEXT NOT NULL
);
INSERT INTO Room VALUES
  (101, 1, 4, 'general'),
  (102, 1, 4, 'general'),
  (103, 1, 1, 'isolation'),
  (104, 1, 2, 'private'),
  (201, 2, 4, 'general'),
  (202, 2, 2, 'intensive care'),
  (203, 2, 2, 'intensive care'),
  (204, 2, 1, 'private'),
  (301, 3, 3, 'general'),
  (302, 3, 1, 'isolation');

CREATE TABLE Patient (
  Patient_ID INTEGER PRIMARY KEY,
  Name TEXT NOT NULL,
  Gender TEXT NOT NULL,
  Age INTEGER NOT NULL,
  Town TEXT NOT NULL,
  Blood_Type TEXT NOT NULL,
  Doctor_ID INTEGER NOT NULL REFERENCES Doctor(Doctor_ID),
  Room_Number INTEGER NOT NULL REFERENCES Room(Room_Number),
  Admission_Date TEXT NOT NULL,
  Discharge_Date TEXT
);
INSERT INTO Patient VALUES
  (1, 'Edith Warrington', 'F', 48, 'Pennick', 'B+', 5, 203, '2024-03-04', '2024-03-07'),
  (2, 'Samson Oduya', 'M', 66, 'Colwell', 'O+', 6, 201, '2024-05-05', NULL),
  (3, 'Lillian Croft', 'F', 67, 'Colwell', 'O-', 1, 101, '2024-01-29', '2024-02-04'),
  (4, 'Gareth Hale', 'M', 35, 'Pennick', 'O+', 4, 301, '2024-03-31', '2024-04-17'),
  (5, 'Miriam Stein', 'F', 43, 'Hartsea', 'O+', 5, 101, '2024-02-27', '2024-03-09'),
  (6, 'Patrick Noonan', 'M', 24, 'Eastbrook', 'A-', 6, 204, '2024-05-09', NULL),
  (7, 'Rekha Menon', 'F', 29, 'Eastbrook', 'O-', 2, 103, '2024-03-18', '2024-04-11'),
  (8, 'Dorothy Finch', 'F', 36, 'Pennick', 'AB+', 6, 204, '2024-01-29', '2024-02-20'),
  (9, 'Luis Arroyo', 'M', 50, 'Colwell', 'A+', 3, 301, '2024-05-12', NULL),
  (10, 'Bettina Kraus', 'F', 83, 'Pennick', 'O+', 7, 301, '2024-03-17', '2024-04-20'),
  (11, 'Harold Yates', 'M', 45, 'Eastbrook', 'B+', 3, 104, '2024-05-23', '2024-06-09'),
  (12, 'Saskia Blom', 'F', 70, 'Colwell', 'B+', 4, 201, '2024-03-13', '2024-03-17'),
  (13, 'Eamon Kerr', 'M', 60, 'Pennick', 'O-', 1, 103, '2024-04-20', '2024-05-03'),
  (14, 'Ivy Thackeray', 'F', 20, 'Eastbrook', 'A+', 7, 102, '2024-01-11', '2024-01-25'),
  (15, 'Tariq Anwar', 'M', 93, 'Colwell', 'A+', 5, 203, '2024-01-08', '2024-02-03'),
  (16, 'Norma Bloom', 'F', 85, 'Colwell', 'A-', 4, 203, '2024-03-04', '2024-03-14'),
  (17, 'Viktor Hanak', 'M', 79, 'Colwell', 'O+', 1, 102, '2024-01-25', '2024-01-31'),
  (18, 'Pearl Adeyemi', 'F', 89, 'Eastbrook', 'A-', 6, 103, '2024-02-01', '2024-02-26'),
  (19, 'Cecil Dunmore', 'M', 78, 'Eastbrook', 'A+', 3, 203, '2024-01-21', '2024-02-04'),
  (20, 'Agnes Rowe', 'F', 55, 'Colwell', 'AB+', 3, 101, '2024-02-04', '2024-02-25'),
  (21, 'Rafael Pinto', 'M', 31, 'Eastbrook', 'A+', 2, 202, '2024-05-11', '2024-05-15'),
  (22, 'Mabel Strand', 'F', 72, 'Eastbrook', 'O+', 2, 104, '2024-04-24', '2024-05-24'),
  (23, 'Kenji Ota', 'M', 44, 'Eastbrook', 'A+', 4, 102, '2024-05-11', NULL),
  (24, 'Winifred Lacey', 'F', 88, 'Pennick', 'A+', 6, 104, '2024-02-01', '2024-03-02'),
  (25, 'Boris Malek', 'M', 75, 'Pennick', 'A-', 5, 203, '2024-05-15', NULL);

CREATE TABLE Medication (
  Medication_ID INTEGER PRIMARY KEY,
  Name TEXT NOT NULL,
  Kind TEXT NOT NULL,
  Form TEXT NOT NULL,
  Unit_Price REAL NOT NULL
);
INSERT INTO Medication VALUES
  (1, 'Amoxalin', 'antibiotic', 'capsule', 0.85),
  (2, 'Cardopril', 'blood pressure', 'tablet', 0.4),
  (3, 'Dormisol', 'sedative', 'tablet', 1.1),
  (4, 'Hepranol', 'anticoagulant', 'injection', 6.75),
  (5, 'Paracetin', 'painkiller', 'tablet', 0.05),
  (6, 'Morphidol', 'painkiller', 'injection', 4.2),
  (7, 'Pulmoclear', 'bronchodilator', 'inhaler', 12.5),
  (8, 'Ferrovit', 'supplement', 'tablet', 0.15),
  (9, 'Cefatrix', 'antibiotic', 'injection', 8.9),
  (10, 'Neurostab', 'anticonvulsant', 'capsule', 2.35),
  (11, 'Glucoril', 'antidiabetic', 'tablet', 0.6);

CREATE TABLE Prescription (
  Prescription_ID INTEGER PRIMARY KEY,
  Patient_ID INTEGER NOT NULL REFERENCES Patient(Patient_ID),
  Medication_ID INTEGER NOT NULL REFERENCES Medication(Medication_ID),
  Doctor_ID INTEGER NOT NULL REFERENCES Doctor(Doctor_ID),
  Dose INTEGER NOT NULL,
  Days INTEGER NOT NULL,
  Prescribed_On TEXT NOT NULL
);
INSERT INTO Prescription VALUES
  (1, 15, 8, 3, 65, 7, '2024-01-10'),
  (2, 15, 6, 5, 5, 14, '2024-01-10'),
  (3, 14, 4, 7, 80, 5, '2024-01-12'),
  (4, 19, 2, 6, 5, 7, '2024-01-22'),
  (5, 19, 6, 3, 10, 14, '2024-01-23'),
  (6, 17, 2, 5, 10, 21, '2024-01-25'),
  (7, 17, 10, 1, 150, 3, '2024-01-25'),
  (8, 17, 7, 1, 100, 3, '2024-01-26'),
  (9, 17, 3, 1, 4, 7, '2024-01-26'),
  (10, 8, 10, 6, 150, 14, '2024-01-30'),
  (11, 8, 9, 6, 2000, 28, '2024-01-31'),
  (12, 18, 6, 6, 5, 28, '2024-02-01'),
  (13, 18, 5, 6, 1000, 10, '2024-02-01'),
  (14, 18, 4, 6, 40, 14, '2024-02-03'),
  (15, 20, 5, 6, 1000, 21, '2024-02-04'),
  (16, 20, 8, 3, 65, 7, '2024-02-06'),
  (17, 5, 1, 5, 500, 5, '2024-02-27'),
  (18, 5, 8, 5, 65, 10, '2024-02-28'),
  (19, 5, 5, 7, 1000, 10, '2024-02-29'),
  (20, 16, 9, 4, 2000, 7, '2024-03-06'),
  (21, 16, 8, 4, 65, 28, '2024-03-06'),
  (22, 1, 1, 5, 250, 10, '2024-03-06'),
  (23, 12, 4, 7, 80, 28, '2024-03-13'),
  (24, 12, 2, 4, 5, 5, '2024-03-13'),
  (25, 12, 1, 4, 500, 3, '2024-03-13'),
  (26, 12, 8, 4, 65, 3, '2024-03-14'),
  (27, 12, 7, 4, 100, 7, '2024-03-14'),
  (28, 7, 2, 1, 20, 7, '2024-03-18'),
  (29, 7, 7, 2, 100, 28, '2024-03-18'),
  (30, 10, 1, 7, 250, 14, '2024-03-18'),
  (31, 10, 7, 7, 200, 14, '2024-03-19'),
  (32, 10, 5, 5, 1000, 10, '2024-03-19'),
  (33, 4, 4, 4, 60, 10, '2024-03-31'),
  (34, 4, 8, 6, 65, 28, '2024-04-01'),
  (35, 4, 1, 4, 250, 14, '2024-04-01'),
  (36, 4, 2, 4, 5, 3, '2024-04-02'),
  (37, 13, 2, 1, 20, 21, '2024-04-20'),
  (38, 22, 5, 2, 1000, 10, '2024-04-25'),
  (39, 2, 1, 5, 500, 14, '2024-05-06'),
  (40, 6, 2, 6, 10, 21, '2024-05-09'),
  (41, 6, 5, 2, 1000, 5, '2024-05-09'),
  (42, 23, 1, 4, 250, 3, '2024-05-11'),
  (43, 6, 8, 6, 65, 21, '2024-05-11'),
  (44, 23, 8, 4, 65, 21, '2024-05-12'),
  (45, 21, 5, 2, 1000, 14, '2024-05-13'),
  (46, 21, 6, 1, 5, 3, '2024-05-13'),
  (47, 21, 10, 1, 300, 3, '2024-05-13'),
  (48, 23, 6, 3, 5, 14, '2024-05-13'),
  (49, 11, 4, 3, 60, 14, '2024-05-23'),
  (50, 11, 9, 3, 2000, 10, '2024-05-25');
