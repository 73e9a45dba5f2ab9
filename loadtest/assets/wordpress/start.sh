#!/bin/sh
# First process of the web container: PHP, nginx and the connection keeper; ends them on SIGTERM.
rm -f /run/commit /run/nginx.pid /run/php/*
mkdir -p /run/php
php-fpm8.2 -R -D
nginx
php /persist.php </dev/null >/dev/null 2>&1 &
keeper=$!
trap 'nginx -s quit; kill $keeper $(cat /run/php/php8.2-fpm.pid); exit 0' TERM
while kill -0 $keeper; do wait $keeper; done
