-- A ski school in the Alps: instructors, pupils, courses and who takes which. Prices in euros.

CREATE TABLE instructor (
  instructor_id INTEGER PRIMARY KEY,
  name TEXT NOT NULL,
  discipline TEXT NOT NULL,
  grade INTEGER NOT NULL,
  hired_year INTEGER NOT NULL,
  native_language TEXT NOT NULL
);
INSERT INTO instructor VALUES
  (1, 'Luca Bernasconi', 'alpine', 4, 2009, 'Italian'),
  (2, 'Freya Dahl', 'cross-country', 3, 2015, 'Norwegian'),
  (3, 'Baptiste Favre', 'alpine', 3, 2012, 'French'),
  (4, 'Katrin Egger', 'snowboard', 4, 2011, 'German'),
  (5, 'Milo Zupan', 'snowboard', 2, 2019, 'Slovene'),
  (6, 'Chloe Renard', 'alpine', 2, 2020, 'French'),
  (7, 'Hamish Baird', 'telemark', 3, 2014, 'English'),
  (8, 'Annika Wikstrom', 'cross-country', 4, 2007, 'Swedish'),
  (9, 'Dario Conti', 'alpine', 1, 2023, 'Italian'),
  (10, 'Sofie Maes', 'snowboard', 1, 2022, 'Dutch');

CREATE TABLE pupil (
  pupil_id INTEGER PRIMARY KEY,
  name TEXT NOT NULL,
  age INTEGER NOT NULL,
  nationality TEXT NOT NULL,
  level TEXT NOT NULL,
  hotel TEXT NOT NULL
);
INSERT INTO pupil VALUES
  (1, 'Oliver Reece', 9, 'British', 'beginner', 'Hotel Edelweiss'),
  (2, 'Mathilde Roy', 14, 'French', 'intermediate', 'Chalet Brume'),
  (3, 'Jonas Keller', 32, 'German', 'advanced', 'Hotel Edelweiss'),
  (4, 'Giulia Ferri', 7, 'Italian', 'beginner', 'Pension Alba'),
  (5, 'Sanne Bakker', 27, 'Dutch', 'intermediate', 'Hotel Edelweiss'),
  (6, 'Pavel Hruska', 41, 'Czech', 'beginner', 'Pension Alba'),
  (7, 'Imogen Clarke', 12, 'British', 'intermediate', 'Chalet Brume'),
  (8, 'Lars Nygaard', 55, 'Danish', 'advanced', 'Grand Col'),
  (9, 'Elena Popescu', 23, 'Romanian', 'beginner', 'Pension Alba'),
  (10, 'Tom Van Dyck', 36, 'Belgian', 'intermediate', 'Grand Col'),
  (11, 'Yuki Sato', 29, 'Japanese', 'advanced', 'Grand Col'),
  (12, 'Martha Quill', 63, 'British', 'intermediate', 'Grand Col'),
  (13, 'Nils Brandt', 10, 'German', 'beginner', 'Hotel Edelweiss'),
  (14, 'Clara Brandt', 8, 'German', 'beginner', 'Hotel Edelweiss'),
  (15, 'Andrea Rossi', 18, 'Italian', 'advanced', 'Chalet Brume'),
  (16, 'Fiona Galt', 44, 'British', 'beginner', 'Hotel Edelweiss'),
  (17, 'Hugo Lambert', 16, 'French', 'intermediate', 'Chalet Brume'),
  (18, 'Marek Novotny', 38, 'Czech', 'intermediate', 'Pension Alba');

CREATE TABLE course (
  course_id INTEGER PRIMARY KEY,
  title TEXT NOT NULL,
  discipline TEXT NOT NULL,
  price REAL NOT NULL,
  days INTEGER NOT NULL,
  max_pupils INTEGER NOT NULL
);
INSERT INTO course VALUES
  (1, 'First Tracks', 'alpine', 180.0, 5, 8),
  (2, 'Parallel Turns', 'alpine', 210.0, 5, 8),
  (3, 'Moguls and Steeps', 'alpine', 295.0, 4, 5),
  (4, 'Board Basics', 'snowboard', 190.0, 5, 7),
  (5, 'Park Sessions', 'snowboard', 240.0, 3, 6),
  (6, 'Classic Stride', 'cross-country', 120.0, 3, 10),
  (7, 'Skating Technique', 'cross-country', 145.0, 3, 10),
  (8, 'Telemark Weekend', 'telemark', 160.0, 2, 4),
  (9, 'Snow Kids', 'alpine', 150.0, 5, 6),
  (10, 'Freeride Camp', 'alpine', 420.0, 6, 4);

CREATE TABLE enrolment (
  enrolment_id INTEGER PRIMARY KEY,
  pupil_id INTEGER NOT NULL REFERENCES pupil(pupil_id),
  course_id INTEGER NOT NULL REFERENCES course(course_id),
  instructor_id INTEGER NOT NULL REFERENCES instructor(instructor_id),
  start_date TEXT NOT NULL,
  paid INTEGER NOT NULL,
  rating INTEGER
);
INSERT INTO enrolment VALUES
  (1, 3, 10, 6, '2024-12-18', 1, 3),
  (2, 12, 5, 5, '2024-12-18', 1, NULL),
  (3, 14, 9, 6, '2024-12-18', 1, 4),
  (4, 7, 7, 8, '2024-12-23', 1, 3),
  (5, 12, 8, 7, '2024-12-25', 1, 3),
  (6, 13, 9, 6, '2024-12-30', 0, 2),
  (7, 8, 7, 8, '2025-01-01', 1, 3),
  (8, 16, 1, 3, '2025-01-07', 0, 5),
  (9, 5, 4, 5, '2025-01-17', 1, 3),
  (10, 17, 4, 4, '2025-01-19', 1, NULL),
  (11, 17, 7, 8, '2025-01-21', 0, 3),
  (12, 5, 7, 8, '2025-01-22', 0, 4),
  (13, 9, 1, 9, '2025-01-25', 1, 4),
  (14, 2, 4, 5, '2025-01-30', 1, 2),
  (15, 9, 6, 2, '2025-01-31', 0, 4),
  (16, 11, 7, 8, '2025-02-04', 0, 5),
  (17, 5, 5, 4, '2025-02-06', 0, 3),
  (18, 15, 10, 6, '2025-02-13', 1, 4),
  (19, 7, 5, 5, '2025-02-14', 1, 2),
  (20, 4, 6, 8, '2025-02-15', 1, 4),
  (21, 5, 2, 6, '2025-02-18', 1, 3),
  (22, 16, 4, 5, '2025-02-20', 1, 4),
  (23, 6, 1, 6, '2025-02-23', 1, 4),
  (24, 10, 2, 1, '2025-02-27', 1, 4),
  (25, 15, 5, 4, '2025-03-01', 0, 5),
  (26, 3, 3, 3, '2025-03-02', 1, 3),
  (27, 6, 6, 2, '2025-03-03', 0, 2),
  (28, 17, 8, 7, '2025-03-05', 1, 4),
  (29, 12, 4, 5, '2025-03-12', 1, 4),
  (30, 14, 6, 8, '2025-03-13', 1, 4),
  (31, 5, 8, 7, '2025-03-13', 1, 4),
  (32, 13, 4, 5, '2025-03-19', 0, 3),
  (33, 1, 9, 3, '2025-03-21', 1, 5),
  (34, 16, 6, 8, '2025-03-22', 1, 4);

CREATE TABLE slope (
  slope_name TEXT PRIMARY KEY,
  colour TEXT NOT NULL,
  length_m INTEGER NOT NULL,
  has_snow_guns INTEGER NOT NULL
);
INSERT INTO slope VALUES
  ('Marmot', 'green', 850, 1),
  ('Larch Lane', 'green', 1200, 1),
  ('Chamois', 'blue', 2100, 1),
  ('Old Mill', 'blue', 1750, 0),
  ('Panorama', 'blue', 3900, 1),
  ('Falcon', 'red', 2600, 1),
  ('Gully', 'red', 1450, 0),
  ('Avalanche', 'black', 1900, 0),
  ('Couloir Noir', 'black', 1300, 0),
  ('Sunrise', 'red', 3100, 1);
