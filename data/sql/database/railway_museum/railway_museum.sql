-- A museum of locomotives run by volunteers. Weights in tonnes, speeds in km/h, money in pounds.

CREATE TABLE Builder (
  Builder_ID INTEGER PRIMARY KEY,
  Name TEXT NOT NULL,
  Country TEXT NOT NULL,
  Founded_Year INTEGER NOT NULL
);
INSERT INTO Builder VALUES
  (1, 'Thornhill & Sons', 'England', 1838),
  (2, 'Clydebank Locomotive Works', 'Scotland', 1864),
  (3, 'Ateliers Duvivier', 'Belgium', 1851),
  (4, 'Maschinenfabrik Rothe', 'Germany', 1870),
  (5, 'Vulcan Foundry of Leeds', 'England', 1846),
  (6, 'Great Eastern Works', 'England', 1859),
  (7, 'Societe Mecanique du Rhone', 'France', 1882),
  (8, 'Skoglund Verkstad', 'Sweden', 1891);

CREATE TABLE Locomotive (
  Loco_ID INTEGER PRIMARY KEY,
  Name TEXT NOT NULL,
  Class TEXT NOT NULL,
  Traction TEXT NOT NULL,
  Builder_ID INTEGER NOT NULL REFERENCES Builder(Builder_ID),
  Year_Built INTEGER NOT NULL,
  Weight REAL NOT NULL,
  Top_Speed INTEGER NOT NULL,
  Status TEXT NOT NULL
);
INSERT INTO Locomotive VALUES
  (1, 'Lady Marian', 'Express', 'steam', 1, 1897, 58.4, 112, 'running'),
  (2, 'Old Pelican', 'Shunter', 'steam', 1, 1871, 22.1, 40, 'on display'),
  (3, 'Duke of Arden', 'Express', 'steam', 6, 1911, 76.9, 128, 'under restoration'),
  (4, 'Clyde Maid', 'Goods', 'steam', 2, 1904, 64.2, 72, 'running'),
  (5, 'Iron Vicar', 'Goods', 'steam', 2, 1889, 55.0, 64, 'stored'),
  (6, 'Kleine Berta', 'Narrow gauge', 'steam', 4, 1908, 14.6, 30, 'running'),
  (7, 'Rothe 52', 'Goods', 'steam', 4, 1942, 84.7, 80, 'on display'),
  (8, 'Meuse Valley', 'Passenger', 'steam', 3, 1923, 61.3, 96, 'stored'),
  (9, 'Sir Percival', 'Passenger', 'steam', 5, 1932, 68.8, 104, 'under restoration'),
  (10, 'Bumblebee', 'Shunter', 'diesel', 5, 1957, 30.2, 48, 'running'),
  (11, 'Northern Spirit', 'Express', 'diesel', 5, 1964, 101.5, 160, 'running'),
  (12, 'Grey Otter', 'Passenger', 'diesel', 6, 1961, 74.0, 120, 'stored'),
  (13, 'Rhone Comet', 'Express', 'electric', 7, 1955, 88.3, 175, 'on display'),
  (14, 'Lyonnaise', 'Passenger', 'electric', 7, 1949, 79.6, 130, 'stored'),
  (15, 'Snow Goose', 'Goods', 'electric', 8, 1938, 92.1, 75, 'on display'),
  (16, 'Little Hobb', 'Narrow gauge', 'steam', 1, 1885, 9.8, 24, 'under restoration'),
  (17, 'Anvil', 'Shunter', 'diesel', 4, 1968, 36.5, 56, 'running'),
  (18, 'Queen of Fens', 'Express', 'steam', 6, 1929, 81.2, 136, 'running'),
  (19, 'Ardennes', 'Goods', 'diesel', 3, 1959, 95.4, 90, 'stored'),
  (20, 'Midnight Mail', 'Passenger', 'steam', 1, 1918, 70.5, 100, 'on display');

CREATE TABLE Volunteer (
  Volunteer_ID INTEGER PRIMARY KEY,
  Name TEXT NOT NULL,
  Age INTEGER NOT NULL,
  Town TEXT NOT NULL,
  Role TEXT NOT NULL,
  Joined_Year INTEGER NOT NULL
);
INSERT INTO Volunteer VALUES
  (1, 'Arthur Penrose', 71, 'Kelby', 'fitter', 1998),
  (2, 'Maureen Stack', 66, 'Kelby', 'guide', 2005),
  (3, 'Dev Chandra', 34, 'Ashcombe', 'fireman', 2016),
  (4, 'Ingrid Solberg', 45, 'Lower Tarn', 'painter', 2011),
  (5, 'Colin Batty', 59, 'Ashcombe', 'driver', 2001),
  (6, 'Ruth Abelson', 28, 'Kelby', 'fitter', 2019),
  (7, 'Hugh Pargeter', 77, 'Lower Tarn', 'signalman', 1989),
  (8, 'Samira Khalil', 41, 'Ashcombe', 'guide', 2014),
  (9, 'Owen Prothero', 52, 'Merrow', 'boilersmith', 2008),
  (10, 'Tessa Grimshaw', 23, 'Merrow', 'fireman', 2022),
  (11, 'Leonard Fisk', 68, 'Kelby', 'driver', 1995),
  (12, 'Beth Carraway', 37, 'Lower Tarn', 'painter', 2017),
  (13, 'Marek Wolny', 49, 'Ashcombe', 'boilersmith', 2012),
  (14, 'Joyce Tindall', 73, 'Merrow', 'shop assistant', 2003),
  (15, 'Piers Hallam', 31, 'Kelby', 'fitter', 2020);

CREATE TABLE Repair (
  Repair_ID INTEGER PRIMARY KEY,
  Loco_ID INTEGER NOT NULL REFERENCES Locomotive(Loco_ID),
  Volunteer_ID INTEGER NOT NULL REFERENCES Volunteer(Volunteer_ID),
  Part TEXT NOT NULL,
  Start_Date TEXT NOT NULL,
  Hours INTEGER NOT NULL,
  Cost REAL NOT NULL
);
INSERT INTO Repair VALUES
  (1, 11, 1, 'wheels', '2020-02-19', 181, 540.98),
  (2, 9, 12, 'cab', '2020-05-06', 209, 46.36),
  (3, 7, 12, 'paintwork', '2020-07-13', 180, 546.16),
  (4, 11, 4, 'paintwork', '2020-11-04', 100, 115.87),
  (5, 3, 1, 'brakes', '2020-12-21', 197, 3408.72),
  (6, 8, 15, 'wheels', '2022-02-06', 87, 3.08),
  (7, 5, 15, 'brakes', '2022-03-03', 170, 3413.3),
  (8, 10, 6, 'cab', '2022-05-08', 24, 814.16),
  (9, 15, 6, 'brakes', '2022-05-18', 232, 343.9),
  (10, 12, 1, 'engine', '2022-05-23', 41, 526.68),
  (11, 16, 9, 'boiler', '2022-06-03', 192, 543.57),
  (12, 11, 6, 'brakes', '2022-07-01', 101, 92.51),
  (13, 2, 15, 'cab', '2022-07-22', 112, 284.42),
  (14, 9, 15, 'wheels', '2022-11-04', 209, 519.19),
  (15, 8, 15, 'valve gear', '2022-11-05', 119, 280.85),
  (16, 5, 15, 'boiler', '2022-11-14', 136, 146.15),
  (17, 6, 9, 'boiler', '2023-01-01', 228, 378.59),
  (18, 13, 1, 'cab', '2023-02-11', 158, 362.03),
  (19, 6, 1, 'valve gear', '2023-05-03', 159, 12.05),
  (20, 14, 9, 'motor', '2023-05-25', 114, 46.77),
  (21, 15, 6, 'brakes', '2023-06-17', 106, 3434.67),
  (22, 12, 1, 'brakes', '2023-07-29', 25, 550.88),
  (23, 12, 15, 'wheels', '2023-09-16', 188, 289.52),
  (24, 4, 15, 'valve gear', '2023-09-28', 215, 1260.85),
  (25, 18, 12, 'paintwork', '2023-10-11', 148, 795.89),
  (26, 12, 6, 'wheels', '2023-10-12', 114, 276.79),
  (27, 2, 15, 'boiler', '2023-11-24', 13, 350.04),
  (28, 6, 12, 'paintwork', '2023-12-05', 79, 372.29),
  (29, 5, 4, 'paintwork', '2023-12-14', 141, 544.65),
  (30, 4, 15, 'cab', '2024-01-01', 175, 145.32),
  (31, 8, 12, 'cab', '2024-02-26', 94, 3436.63),
  (32, 1, 6, 'cab', '2024-03-18', 114, 2112.6),
  (33, 12, 4, 'paintwork', '2024-03-21', 162, 805.03),
  (34, 17, 6, 'wheels', '2024-05-03', 106, 2114.04),
  (35, 1, 15, 'boiler', '2024-05-07', 128, 282.03),
  (36, 11, 1, 'engine', '2024-05-28', 93, 3433.34);

CREATE TABLE Visit_Day (
  Visit_Date TEXT PRIMARY KEY,
  Weather TEXT NOT NULL,
  Adults INTEGER NOT NULL,
  Children INTEGER NOT NULL,
  Takings REAL NOT NULL
);
INSERT INTO Visit_Day VALUES
  ('2024-04-06', 'rain', 69, 39, 831.0),
  ('2024-04-12', 'sunny', 272, 157, 3263.5),
  ('2024-04-18', 'sunny', 266, 144, 3161.5),
  ('2024-04-25', 'sunny', 167, 91, 1982.5),
  ('2024-04-26', 'sunny', 161, 42, 1718.5),
  ('2024-05-04', 'windy', 72, 18, 765.0),
  ('2024-05-10', 'windy', 136, 45, 1494.5),
  ('2024-05-18', 'sunny', 179, 66, 1984.0),
  ('2024-05-26', 'sunny', 240, 78, 2631.0),
  ('2024-05-27', 'sunny', 211, 111, 2504.0),
  ('2024-05-28', 'rain', 206, 113, 2465.5),
  ('2024-06-04', 'sunny', 218, 101, 2498.5),
  ('2024-06-05', 'rain', 142, 74, 1682.0),
  ('2024-06-06', 'sunny', 161, 47, 1741.0),
  ('2024-06-14', 'sunny', 172, 74, 1940.0),
  ('2024-06-21', 'sunny', 230, 63, 2441.5),
  ('2024-06-29', 'windy', 137, 51, 1531.0),
  ('2024-07-06', 'rain', 91, 26, 981.5),
  ('2024-07-14', 'sunny', 295, 92, 3203.0),
  ('2024-07-22', 'windy', 198, 75, 2218.5);
