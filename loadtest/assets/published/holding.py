"""The holding application of the published arrangement: it keeps a request until the target serves, and then sends the
client there. All its workers share what they know through memcached, so that one question in a while is enough."""

import os
import time
import urllib.request

from flask import Flask, redirect, request
from pymemcache.client.base import Client

TARGET = os.environ["TARGET"]
MEMCACHED = os.environ["MEMCACHED"]
POLL_S = 0.25
ANY = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]

app = Flask(__name__)


def serves(cache):
    if cache.get("serves"):
        return True
    try:
        urllib.request.urlopen(f"{TARGET}/health", timeout=1).close()
    except OSError:
        return False
    cache.set("serves", "yes")
    return True


@app.route("/", defaults={"path": ""}, methods=ANY)
@app.route("/<path:path>", methods=ANY)
def hold(path):
    request.get_data()
    cache = Client(MEMCACHED)
    while not serves(cache):
        time.sleep(POLL_S)
    cache.close()
    return redirect(f"{TARGET}/{path}", code=302)
