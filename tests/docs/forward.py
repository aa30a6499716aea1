#!/usr/bin/python3
"""Carries TCP connections from one address to another: a guest's localhost is not the sandbox's.

    forward.py LISTEN_HOST:PORT CONNECT_HOST:PORT
"""

import asyncio
import sys


async def copy(reader, writer):
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.close()


async def main():
    (here, port), (there, other) = (a.rsplit(":", 1) for a in sys.argv[1:])

    async def connected(reader, writer):
        try:
            out_reader, out_writer = await asyncio.open_connection(there, int(other))
        except OSError:
            writer.close()
            return
        await asyncio.gather(copy(reader, out_writer), copy(out_reader, writer))
        out_writer.close()
        writer.close()

    server = await asyncio.start_server(connected, here, int(port))
    await server.serve_forever()


asyncio.run(main())
