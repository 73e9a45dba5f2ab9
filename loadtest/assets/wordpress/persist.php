<?php
// Keeps two database connections open for ever: one inserts a row every 100 ms, the other sits in an open
// transaction until /run/commit appears. What is in the tables afterwards shows whether the connections moved.
mysqli_report(MYSQLI_REPORT_OFF);
$boot = bin2hex(random_bytes(6));

function connect() {
    $connection = mysqli_init();
    mysqli_options($connection, MYSQLI_OPT_CONNECT_TIMEOUT, 2);
    return @mysqli_real_connect($connection, '10.44.0.2', 'wordpress', 'lab', 'wordpress') ? $connection : null;
}

function run($boot) {
    $loop = connect();
    $open = connect();
    if (!$loop || !$open) return;
    if (!mysqli_query($open, 'BEGIN')) return;
    if (!mysqli_query($open, "INSERT INTO lab_transaction VALUES ('$boot', CONNECTION_ID(), 'before')")) return;
    for ($sequence = 1;; $sequence++) {
        if (!mysqli_query($loop, "INSERT INTO lab_persist VALUES ('$boot', CONNECTION_ID(), $sequence)")) return;
        if ($open && file_exists('/run/commit')) {
            mysqli_query($open, "INSERT INTO lab_transaction VALUES ('$boot', CONNECTION_ID(), 'after')");
            mysqli_query($open, 'COMMIT');
            mysqli_close($open);
            $open = null;
        }
        usleep(100000);
    }
}

while (true) {
    run($boot);
    usleep(500000);
    $boot = bin2hex(random_bytes(6));
}
