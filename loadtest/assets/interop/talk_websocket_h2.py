"""A WebSocket inside an HTTP/2 stream (RFC 8441): PORT [CA]. Prints what it got."""
import os
import socket
import ssl
import struct
import sys

import h2.config
import h2.connection
import h2.events
import h2.settings


def frame(opcode, payload):
    mask = os.urandom(4)
    head = bytes([0x80 | opcode])
    if len(payload) < 126:
        head += bytes([0x80 | len(payload)])
    else:
        head += bytes([0x80 | 126]) + struct.pack(">H", len(payload))
    return head + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))


class Client:
    def __init__(self, port, ca):
        stream = socket.create_connection(("127.0.0.1", port), timeout=20)
        if ca:
            tls = ssl.create_default_context(cafile=ca)
            tls.set_alpn_protocols(["h2"])
            stream = tls.wrap_socket(stream, server_hostname="bench.test")
            print("alpn", stream.selected_alpn_protocol())
        self.stream = stream
        self.http = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.http.initiate_connection()
        self.flush()
        self.data = b""
        self.status = None
        self.ended = False
        self.settled = False

    def flush(self):
        self.stream.sendall(self.http.data_to_send())

    def read(self):
        received = self.stream.recv(65536)
        if not received:
            sys.exit("the connection ended")
        for event in self.http.receive_data(received):
            if isinstance(event, h2.events.RemoteSettingsChanged):
                self.settled = True
            elif isinstance(event, h2.events.ResponseReceived):
                self.status = dict(event.headers)[":status"]
            elif isinstance(event, h2.events.DataReceived):
                self.data += event.data
                self.http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, (h2.events.StreamEnded, h2.events.StreamReset)):
                self.ended = True
        self.flush()

    def message(self):
        while len(self.data) < 2 or len(self.data) < self.length():
            self.read()
        length, head = self.length(), self.head()
        payload, opcode = self.data[head:length], self.data[0] & 15
        self.data = self.data[length:]
        return opcode, payload

    def head(self):
        return 4 if self.data[1] == 126 else 2

    def length(self):
        if self.data[1] < 126:
            return 2 + self.data[1]
        return 4 + struct.unpack(">H", self.data[2:4])[0] if len(self.data) >= 4 else 4


def main(port, ca=None):
    client = Client(int(port), ca)
    while not client.settled:
        client.read()
    enabled = client.http.remote_settings.get(h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL)
    print("extended connect", enabled)
    client.http.send_headers(1, [
        (":method", "CONNECT"), (":protocol", "websocket"), (":scheme", "https" if ca else "http"),
        (":path", "/"), (":authority", "bench.test"), ("sec-websocket-version", "13"),
    ])
    client.flush()
    while client.status is None:
        client.read()
    print("status", client.status)
    client.http.send_data(1, frame(1, b"hello"))
    client.flush()
    print("text", client.message()[1].decode())
    client.http.send_data(1, frame(2, b"x" * 5000))
    client.flush()
    opcode, payload = client.message()
    print("binary", opcode, len(payload))
    client.http.send_data(1, frame(1, b"leave"))
    client.flush()
    opcode, payload = client.message()
    print("closed", opcode, struct.unpack(">H", payload[:2])[0], payload[2:].decode())


main(*sys.argv[1:])
