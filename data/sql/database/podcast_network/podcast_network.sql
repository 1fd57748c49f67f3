-- A network of podcasts: hosts, shows, episodes and sponsors. Lengths in minutes, fees in dollars.

CREATE TABLE host (
  HostId INTEGER PRIMARY KEY,
  Name TEXT NOT NULL,
  Country TEXT NOT NULL,
  Age INTEGER NOT NULL,
  Followers INTEGER NOT NULL
);
INSERT INTO host VALUES
  (1, 'Mina Castellane', 'Canada', 38, 54200),
  (2, 'Theo Brandvold', 'Norway', 45, 18700),
  (3, 'Abigail Nkemelu', 'Nigeria', 31, 92300),
  (4, 'Ruben Salgado', 'Spain', 52, 40150),
  (5, 'Priscilla Tan', 'Singapore', 29, 120400),
  (6, 'Jasper Kilbride', 'Ireland', 41, 27600),
  (7, 'Noemi Fabre', 'France', 35, 66800),
  (8, 'Walter Osei', 'Ghana', 60, 8900),
  (9, 'Dilnoza Karimova', 'Uzbekistan', 27, 35500),
  (10, 'Sven Aalto', 'Finland', 48, 15300),
  (11, 'Carla Whitcombe', 'Canada', 33, 7400);

CREATE TABLE show (
  ShowId INTEGER PRIMARY KEY,
  Title TEXT NOT NULL,
  Genre TEXT NOT NULL,
  HostId INTEGER NOT NULL REFERENCES host(HostId),
  LaunchYear INTEGER NOT NULL,
  Language TEXT NOT NULL
);
INSERT INTO show VALUES
  (1, 'Salt and Ember', 'food', 1, 2018, 'English'),
  (2, 'Cold Cases, Warm Tea', 'true crime', 6, 2016, 'English'),
  (3, 'The Ledger Line', 'business', 5, 2020, 'English'),
  (4, 'Tiempo Muerto', 'sport', 4, 2015, 'Spanish'),
  (5, 'Small Planets', 'science', 2, 2019, 'English'),
  (6, 'Lagos After Dark', 'culture', 3, 2021, 'English'),
  (7, 'Le Fil Rouge', 'true crime', 7, 2017, 'French'),
  (8, 'Grandfather Stories', 'history', 8, 2014, 'English'),
  (9, 'Silk Road Radio', 'history', 9, 2022, 'English'),
  (10, 'Byte by Byte', 'technology', 5, 2021, 'English'),
  (11, 'Forest Hour', 'science', 10, 2018, 'Finnish'),
  (12, 'Second Helping', 'food', 1, 2023, 'English'),
  (13, 'Cuisine de Minuit', 'food', 7, 2022, 'French'),
  (14, 'Penalty Shootout', 'sport', 3, 2023, 'English');

CREATE TABLE episode (
  EpisodeId INTEGER PRIMARY KEY,
  ShowId INTEGER NOT NULL REFERENCES show(ShowId),
  Title TEXT NOT NULL,
  Season INTEGER NOT NULL,
  Length INTEGER NOT NULL,
  ReleaseDate TEXT NOT NULL,
  Downloads INTEGER NOT NULL
);
INSERT INTO episode VALUES
  (1, 1, 'Smoke Signals', 4, 56, '2021-04-02', 6328),
  (2, 1, 'The Onion Hour', 4, 79, '2021-06-01', 6794),
  (3, 1, 'Knife Skills', 4, 20, '2021-06-15', 9014),
  (4, 1, 'Bread and Patience', 5, 25, '2021-07-13', 7397),
  (5, 1, 'Bitter Greens', 5, 64, '2021-11-10', 7890),
  (6, 2, 'The Locked Pantry', 6, 31, '2021-08-31', 18096),
  (7, 2, 'Footprints at Low Tide', 6, 51, '2021-09-14', 29409),
  (8, 2, 'The Second Key', 6, 39, '2021-10-05', 19106),
  (9, 2, 'A Quiet Landlord', 7, 29, '2021-11-02', 30340),
  (10, 2, 'Nine Letters', 7, 67, '2021-11-30', 23225),
  (11, 3, 'What a Bond Is', 2, 78, '2021-04-05', 22879),
  (12, 3, 'The Price of Rice', 2, 56, '2021-08-03', 15787),
  (13, 3, 'Founders and Feuds', 2, 91, '2021-08-31', 33927),
  (14, 3, 'Inventory', 3, 83, '2021-09-28', 20673),
  (15, 4, 'El Penal', 7, 54, '2021-07-04', 12372),
  (16, 4, 'La Banda Izquierda', 7, 47, '2021-07-25', 10861),
  (17, 4, 'Noventa Minutos', 7, 33, '2021-08-08', 7755),
  (18, 5, 'Moons with Oceans', 3, 86, '2021-06-13', 18719),
  (19, 5, 'Dust', 3, 36, '2021-07-11', 23959),
  (20, 5, 'How Comets Die', 3, 26, '2021-08-01', 15191),
  (21, 5, 'The Long Count', 4, 74, '2021-08-22', 13144),
  (22, 5, 'Ice Giants', 4, 73, '2021-09-19', 20204),
  (23, 6, 'Night Market', 1, 89, '2021-07-13', 14376),
  (24, 6, 'Highlife', 1, 30, '2021-08-10', 25909),
  (25, 6, 'Third Mainland Bridge', 1, 53, '2021-08-31', 24572),
  (26, 6, 'Tailors', 2, 48, '2021-12-29', 12998),
  (27, 7, 'La Rue Sans Nom', 5, 76, '2021-04-16', 6882),
  (28, 7, 'Le Temoin', 5, 28, '2021-05-14', 16455),
  (29, 7, 'Pluie de Juin', 5, 59, '2021-06-11', 6800),
  (30, 8, 'The Cocoa Road', 8, 37, '2021-04-24', 5500),
  (31, 8, 'Drums of Kumasi', 8, 27, '2021-06-23', 3573),
  (32, 8, 'Letters Home', 8, 74, '2021-07-14', 3567),
  (33, 8, 'The Last Ferry', 9, 66, '2021-08-11', 4795),
  (34, 9, 'Paper from Samarkand', 1, 91, '2022-04-26', 3961),
  (35, 9, 'Caravans', 1, 76, '2022-05-10', 5002),
  (36, 9, 'The Melon Seller', 1, 55, '2022-06-07', 7614),
  (37, 10, 'Garbage Collection', 1, 72, '2021-03-26', 45495),
  (38, 10, 'Off by One', 1, 22, '2021-04-09', 19866),
  (39, 10, 'The Tape Archive', 1, 94, '2021-04-30', 38304),
  (40, 10, 'Dark Mode', 2, 23, '2021-05-21', 34386),
  (41, 11, 'Sammal', 4, 59, '2021-04-05', 5591),
  (42, 11, 'Revontulet', 4, 85, '2021-04-19', 3125),
  (43, 11, 'Suo', 4, 43, '2021-06-18', 3772),
  (44, 12, 'Leftovers', 1, 70, '2023-05-24', 8735),
  (45, 12, 'The Family Pot', 1, 71, '2023-06-14', 8348),
  (46, 12, 'Pickle Politics', 1, 45, '2023-08-13', 8788),
  (47, 13, 'La Soupe', 1, 50, '2022-02-10', 4437),
  (48, 13, 'Le Pain Perdu', 1, 44, '2022-06-10', 7136);

CREATE TABLE sponsor (
  SponsorId INTEGER PRIMARY KEY,
  Name TEXT NOT NULL,
  Industry TEXT NOT NULL,
  Budget INTEGER NOT NULL
);
INSERT INTO sponsor VALUES
  (1, 'Fennel Kitchenware', 'retail', 60000),
  (2, 'Quillpost', 'software', 150000),
  (3, 'Bluefin Bank', 'finance', 240000),
  (4, 'Tallow & Wick', 'retail', 18000),
  (5, 'Kestrel Bikes', 'sport', 75000),
  (6, 'Nightjar Mattress', 'retail', 110000),
  (7, 'Verdigris Games', 'software', 52000),
  (8, 'Pinnacle Teas', 'food', 27500),
  (9, 'Orchard Insurance', 'finance', 90000);

CREATE TABLE sponsorship (
  ShowId INTEGER NOT NULL REFERENCES show(ShowId),
  SponsorId INTEGER NOT NULL REFERENCES sponsor(SponsorId),
  Fee INTEGER NOT NULL,
  Year INTEGER NOT NULL,
  PRIMARY KEY (ShowId, SponsorId)
);
INSERT INTO sponsorship VALUES
  (1, 2, 595, 2019),
  (1, 5, 810, 2022),
  (2, 4, 5045, 2022),
  (2, 5, 5030, 2019),
  (2, 6, 3665, 2022),
  (2, 8, 2430, 2021),
  (3, 3, 6520, 2022),
  (4, 1, 1225, 2024),
  (5, 3, 1805, 2021),
  (6, 2, 3600, 2023),
  (7, 2, 3625, 2021),
  (7, 3, 1505, 2020),
  (7, 4, 530, 2020),
  (8, 5, 4220, 2019),
  (8, 6, 1585, 2019),
  (8, 7, 815, 2020),
  (10, 2, 4260, 2021),
  (10, 3, 1845, 2024),
  (10, 6, 3675, 2024),
  (11, 5, 1860, 2022),
  (12, 3, 545, 2023),
  (12, 8, 4275, 2024),
  (13, 6, 2480, 2022),
  (13, 8, 2415, 2022);
