-- A marine research station: vessels, scientists, expeditions and what they saw. Depths in metres, budgets in euros, temperatures in Celsius.

CREATE TABLE vessel (
  vessel_id INTEGER PRIMARY KEY,
  name TEXT NOT NULL,
  length REAL NOT NULL,
  built_year INTEGER NOT NULL,
  crew_size INTEGER NOT NULL,
  home_port TEXT NOT NULL
);
INSERT INTO vessel VALUES
  (1, 'Petrel', 34.5, 1998, 12, 'Bergen'),
  (2, 'Aurelia', 52.0, 2011, 24, 'Brest'),
  (3, 'Northern Tern', 41.2, 2004, 18, 'Bergen'),
  (4, 'Kittiwake', 18.9, 2016, 6, 'Oban'),
  (5, 'Meridian', 77.4, 2019, 40, 'Brest'),
  (6, 'Little Auk', 12.3, 2021, 4, 'Oban'),
  (7, 'Sea Holly', 28.0, 1989, 9, 'Galway');

CREATE TABLE scientist (
  scientist_id INTEGER PRIMARY KEY,
  name TEXT NOT NULL,
  field TEXT NOT NULL,
  country TEXT NOT NULL,
  age INTEGER NOT NULL,
  grade TEXT NOT NULL
);
INSERT INTO scientist VALUES
  (1, 'Ingunn Dale', 'cetaceans', 'Norway', 47, 'senior'),
  (2, 'Pascal Le Goff', 'plankton', 'France', 55, 'principal'),
  (3, 'Moira Sinclair', 'seabirds', 'Scotland', 39, 'senior'),
  (4, 'Tadhg Brennan', 'fisheries', 'Ireland', 44, 'associate'),
  (5, 'Akiko Hayama', 'deep sea', 'Japan', 36, 'principal'),
  (6, 'Lorenzo Piras', 'corals', 'Italy', 41, 'principal'),
  (7, 'Sunniva Aas', 'cetaceans', 'Norway', 29, 'junior'),
  (8, 'Gwen Trevail', 'plankton', 'England', 33, 'junior'),
  (9, 'Callum Reid', 'seabirds', 'Scotland', 26, 'junior'),
  (10, 'Adele Morvan', 'deep sea', 'France', 50, 'senior'),
  (11, 'Bjarne Lie', 'fisheries', 'Norway', 62, 'associate'),
  (12, 'Nuria Campos', 'corals', 'Spain', 31, 'associate');

CREATE TABLE expedition (
  expedition_id INTEGER PRIMARY KEY,
  title TEXT NOT NULL,
  vessel_id INTEGER NOT NULL REFERENCES vessel(vessel_id),
  leader_id INTEGER NOT NULL REFERENCES scientist(scientist_id),
  departure_date TEXT NOT NULL,
  days INTEGER NOT NULL,
  budget INTEGER NOT NULL
);
INSERT INTO expedition VALUES
  (1, 'Fjord Whale Survey', 1, 1, '2021-05-10', 21, 84000),
  (2, 'Biscay Bloom', 2, 2, '2021-06-02', 30, 152000),
  (3, 'St Kilda Seabird Count', 4, 3, '2021-06-20', 12, 26500),
  (4, 'Porcupine Bank Trawl', 3, 4, '2021-09-14', 18, 97000),
  (5, 'Abyssal Gardens', 5, 10, '2022-03-01', 45, 410000),
  (6, 'Cold Reef Mapping', 2, 6, '2022-04-18', 28, 176000),
  (7, 'Winter Herring', 3, 11, '2022-01-11', 16, 88500),
  (8, 'Minke Acoustics', 1, 7, '2022-07-05', 14, 61000),
  (9, 'Hebrides Plankton Line', 4, 8, '2022-08-22', 10, 23000),
  (10, 'Trench Edge', 5, 5, '2023-02-09', 52, 465000),
  (11, 'Orca and Herring', 3, 1, '2023-11-03', 20, 104000),
  (12, 'Puffin Foraging', 6, 9, '2023-06-12', 9, 14500),
  (13, 'Coral Recovery', 2, 6, '2023-05-15', 25, 158000),
  (14, 'Skagerrak Stock Check', 3, 11, '2024-02-20', 15, 79000);

CREATE TABLE species (
  species_id INTEGER PRIMARY KEY,
  common_name TEXT NOT NULL,
  animal_group TEXT NOT NULL,
  protected TEXT NOT NULL,
  lifespan REAL NOT NULL
);
INSERT INTO species VALUES
  (1, 'Minke whale', 'mammal', 'yes', 35.0),
  (2, 'Orca', 'mammal', 'yes', 45.0),
  (3, 'Harbour porpoise', 'mammal', 'no', 12.0),
  (4, 'Atlantic puffin', 'bird', 'yes', 25.0),
  (5, 'Northern gannet', 'bird', 'no', 21.0),
  (6, 'Atlantic herring', 'fish', 'no', 15.0),
  (7, 'Atlantic cod', 'fish', 'yes', 25.0),
  (8, 'Orange roughy', 'fish', 'yes', 149.0),
  (9, 'Cold-water coral', 'coral', 'yes', 1000.0),
  (10, 'Bubblegum coral', 'coral', 'yes', 200.0),
  (11, 'Moon jellyfish', 'jellyfish', 'no', 1.5),
  (12, 'Copepod', 'crustacean', 'no', 0.5),
  (13, 'Dumbo octopus', 'mollusc', 'no', 4.0),
  (14, 'Basking shark', 'fish', 'yes', 50.0);

CREATE TABLE sighting (
  sighting_id INTEGER PRIMARY KEY,
  expedition_id INTEGER NOT NULL REFERENCES expedition(expedition_id),
  species_id INTEGER NOT NULL REFERENCES species(species_id),
  sighted_on TEXT NOT NULL,
  number_seen INTEGER NOT NULL,
  depth INTEGER NOT NULL,
  water_temperature REAL NOT NULL
);
INSERT INTO sighting VALUES
  (1, 1, 5, '2021-05-11', 246, 0, 12.3),
  (2, 1, 3, '2021-05-25', 5, 12, 13.0),
  (3, 1, 1, '2021-05-26', 12, 8, 15.3),
  (4, 1, 2, '2021-05-27', 2, 23, 12.4),
  (5, 2, 5, '2021-06-03', 243, 6, 12.7),
  (6, 2, 11, '2021-06-15', 91, 1, 13.2),
  (7, 2, 3, '2021-06-17', 12, 4, 10.7),
  (8, 2, 12, '2021-06-21', 6564, 24, 12.7),
  (9, 3, 4, '2021-06-23', 560, 2, 13.5),
  (10, 2, 3, '2021-06-25', 5, 30, 14.5),
  (11, 3, 5, '2021-06-26', 167, 4, 10.1),
  (12, 3, 5, '2021-06-26', 582, 2, 11.4),
  (13, 2, 5, '2021-06-27', 224, 3, 10.1),
  (14, 3, 4, '2021-06-30', 258, 0, 14.6),
  (15, 4, 7, '2021-09-30', 2048, 384, 7.6),
  (16, 4, 6, '2021-10-01', 2089, 357, 5.0),
  (17, 7, 6, '2022-01-14', 944, 665, 8.8),
  (18, 7, 6, '2022-01-21', 652, 520, 8.8),
  (19, 7, 2, '2022-01-21', 2, 25, 7.3),
  (20, 5, 13, '2022-03-07', 5, 3839, 3.3),
  (21, 5, 13, '2022-04-07', 3, 2562, 2.2),
  (22, 6, 9, '2022-04-25', 8, 532, 4.9),
  (23, 6, 13, '2022-04-29', 4, 2003, 3.1),
  (24, 6, 9, '2022-04-30', 43, 349, 5.0),
  (25, 6, 13, '2022-04-30', 2, 2118, 2.3),
  (26, 6, 13, '2022-05-02', 3, 1799, 2.4),
  (27, 6, 13, '2022-05-03', 5, 3368, 1.9),
  (28, 6, 9, '2022-05-03', 41, 924, 6.7),
  (29, 6, 9, '2022-05-05', 47, 364, 6.6),
  (30, 6, 10, '2022-05-13', 48, 657, 8.3),
  (31, 8, 1, '2022-07-06', 6, 38, 12.8),
  (32, 8, 3, '2022-07-07', 9, 35, 13.5),
  (33, 8, 3, '2022-07-10', 5, 15, 12.6),
  (34, 8, 3, '2022-07-12', 8, 19, 13.7),
  (35, 8, 3, '2022-07-17', 11, 5, 12.4),
  (36, 9, 5, '2022-08-22', 487, 6, 11.3),
  (37, 9, 12, '2022-08-27', 1350, 69, 15.8),
  (38, 9, 12, '2022-08-30', 5283, 87, 15.8),
  (39, 9, 11, '2022-08-31', 178, 5, 14.8),
  (40, 10, 13, '2023-02-25', 3, 1516, 3.5),
  (41, 10, 13, '2023-03-12', 5, 3251, 2.6),
  (42, 10, 13, '2023-04-01', 2, 3141, 2.4),
  (43, 10, 8, '2023-04-01', 628, 646, 6.0),
  (44, 12, 4, '2023-06-13', 327, 4, 9.9),
  (45, 12, 4, '2023-06-14', 194, 1, 14.3),
  (46, 12, 4, '2023-06-18', 420, 6, 12.0),
  (47, 12, 5, '2023-06-19', 311, 5, 14.8),
  (48, 12, 5, '2023-06-20', 395, 1, 11.9),
  (49, 11, 3, '2023-11-03', 8, 22, 8.4),
  (50, 11, 1, '2023-11-04', 4, 4, 8.0),
  (51, 11, 2, '2023-11-20', 10, 20, 5.0),
  (52, 14, 7, '2024-02-26', 1664, 423, 5.7),
  (53, 14, 7, '2024-03-04', 2283, 305, 8.5),
  (54, 14, 6, '2024-03-04', 894, 48, 6.6);
