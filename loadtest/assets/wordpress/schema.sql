CREATE DATABASE IF NOT EXISTS wordpress;
CREATE USER IF NOT EXISTS wordpress@'%' IDENTIFIED BY 'lab';
GRANT ALL ON wordpress.* TO wordpress@'%';
USE wordpress;
CREATE TABLE IF NOT EXISTS lab_ids (n INT AUTO_INCREMENT PRIMARY KEY, id VARCHAR(64) NOT NULL, KEY (id));
CREATE TABLE IF NOT EXISTS lab_persist (boot VARCHAR(16), connection INT, sequence INT);
CREATE TABLE IF NOT EXISTS lab_transaction (boot VARCHAR(16), connection INT, moment VARCHAR(8));
