"""A WebSocket origin: echoes every message, says "bye" with close code 4001 when asked to."""
import asyncio

import websockets


async def talk(socket):
    async for message in socket:
        if message == "leave":
            await socket.close(4001, "bye")
            return
        await socket.send(message)


async def main():
    async with websockets.serve(talk, "127.0.0.1", 0, max_size=None) as server:
        print("listening", server.sockets[0].getsockname()[1], flush=True)
        await asyncio.Future()


asyncio.run(main())
