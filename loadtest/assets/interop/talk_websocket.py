"""A WebSocket client: URL [CA]. Prints what it got."""
import asyncio
import hashlib
import ssl
import sys

import websockets


async def main(url, ca=None):
    tls = ssl.create_default_context(cafile=ca) if ca else None
    async with websockets.connect(url, ssl=tls, server_hostname="bench.test" if ca else None, max_size=None) as socket:
        await socket.send("hello")
        print("text", await socket.recv())
        block = bytes(range(256)) * 4096
        await socket.send(block)
        back = await socket.recv()
        print("binary", len(back), hashlib.sha256(back).digest() == hashlib.sha256(block).digest())
        for number in range(500):
            await socket.send(str(number))
        print("in order", [await socket.recv() for _ in range(500)] == [str(number) for number in range(500)])
        await (await socket.ping())
        print("pong")
        await socket.send("leave")
        try:
            await socket.recv()
        except websockets.ConnectionClosed as closed:
            print("closed", closed.rcvd.code, closed.rcvd.reason)


asyncio.run(main(*sys.argv[1:]))
