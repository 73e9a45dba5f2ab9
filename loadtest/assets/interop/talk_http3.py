"""An HTTP/3 client on aioquic: PORT CA. Prints what it got."""
import asyncio
import hashlib
import ssl
import sys

from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration


class Client(QuicConnectionProtocol):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.http = H3Connection(self._quic)
        self.waiting = {}

    def quic_event_received(self, event):
        for part in self.http.handle_event(event):
            answer = self.waiting.get(getattr(part, "stream_id", None))
            if answer is None:
                continue
            if isinstance(part, HeadersReceived):
                answer["headers"] |= dict(part.headers)
            elif isinstance(part, DataReceived):
                answer["body"] += part.data
            if part.stream_ended:
                answer["done"].set_result(None)

    async def ask(self, method, path, body=None):
        stream = self._quic.get_next_available_stream_id()
        answer = {"headers": {}, "body": b"", "done": asyncio.get_running_loop().create_future()}
        self.waiting[stream] = answer
        headers = [(b":method", method), (b":scheme", b"https"), (b":authority", b"bench.test"), (b":path", path)]
        self.http.send_headers(stream, headers, end_stream=body is None)
        if body is not None:
            self.http.send_data(stream, body, end_stream=True)
        self.transmit()
        await asyncio.wait_for(answer["done"], 20)
        return answer["headers"][b":status"].decode(), answer["body"]


async def main(port, ca):
    configuration = QuicConfiguration(is_client=True, alpn_protocols=H3_ALPN, server_name="bench.test")
    configuration.load_verify_locations(ca)
    configuration.verify_mode = ssl.CERT_REQUIRED
    async with connect("127.0.0.1", int(port), configuration=configuration, create_protocol=Client) as client:
        status, body = await client.ask(b"GET", b"/three")
        print("get", status, body.decode().strip())
        block = bytes(range(256)) * 4096
        status, body = await client.ask(b"POST", b"/echo", block)
        print("post", status, hashlib.sha256(body).digest() == hashlib.sha256(block).digest())
        answers = await asyncio.gather(*(client.ask(b"GET", b"/%d" % number) for number in range(50)))
        print("many", all(answer == ("200", b"GET /%d https\n" % number) for number, answer in enumerate(answers)))


asyncio.run(main(*sys.argv[1:]))
