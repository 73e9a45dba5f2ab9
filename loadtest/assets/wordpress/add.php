<?php
// Stores one unique id through WordPress' own database layer and acknowledges it with 201.
// Nothing here checks for duplicates: a request handed over twice must leave two rows.
require __DIR__ . '/wp-load.php';
global $wpdb;
$wpdb->suppress_errors();
$stored = isset($_POST['id']) && $wpdb->insert('lab_ids', array('id' => $_POST['id'])) === 1;
$body = $stored ? $wpdb->insert_id . "\n" : 'not stored: ' . $wpdb->last_error . "\n";
http_response_code($stored ? 201 : 500);
header('Content-Type: text/plain');
header('Content-Length: ' . strlen($body));
echo $body;
