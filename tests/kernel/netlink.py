#!/usr/bin/python3
"""Attaches a volume so that the kernel waits for its server to come back.

Runs in the guest. The kernel can keep a device, and the requests in flight, while
it has no connection (dead connection timeout) and take a new socket for it later
(reconfigure); it then sends again whatever was not answered. nbd-client 3.24 asks
for neither, so this speaks the kernel's nbd netlink interface itself.

  netlink.py connect INDEX HOST PORT NAME CONNECTIONS
  netlink.py reconnect INDEX HOST PORT NAME CONNECTIONS
"""

import socket
import struct
import sys
import time

import rawnbd

NETLINK_GENERIC = 16
NLM_F_REQUEST, NLM_F_ACK = 1, 4
NLMSG_ERROR = 2
GENL_ID_CTRL, CTRL_CMD_GETFAMILY = 16, 3
CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME = 1, 2
NLA_F_NESTED = 0x8000

NBD_CMD_CONNECT, NBD_CMD_RECONFIGURE = 1, 3
(ATTR_INDEX, ATTR_SIZE_BYTES, ATTR_BLOCK_SIZE_BYTES, ATTR_TIMEOUT, ATTR_SERVER_FLAGS,
 ATTR_CLIENT_FLAGS, ATTR_SOCKETS, ATTR_DEAD_CONN_TIMEOUT) = range(1, 9)
SOCK_ITEM, SOCK_FD = 1, 1


def attribute(kind, data):
    out = struct.pack("=HH", len(data) + 4, kind) + data
    return out + bytes(-len(out) % 4)


def call(nl, family, command, payload):
    """One generic netlink request; gives the reply's attributes, or nothing for a bare ACK."""
    body = struct.pack("=BBH", command, 1, 0) + payload
    nl.send(struct.pack("=LHHLL", 16 + len(body), family, NLM_F_REQUEST | NLM_F_ACK, 1, 0) + body)
    found = {}
    while True:
        data = nl.recv(65536)
        while data:
            length, kind = struct.unpack_from("=LH", data)
            if kind == NLMSG_ERROR:
                (error,) = struct.unpack_from("=l", data, 16)
                if error:
                    raise OSError(-error, "netlink")
                return found
            at = 20
            while at < length:
                size, what = struct.unpack_from("=HH", data, at)
                found[what & 0x3FFF] = data[at + 4:at + size]
                at += (size + 3) & ~3
            data = data[(length + 3) & ~3:]


def main():
    command, index, host, port, name, count = sys.argv[1:]
    nl = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC)
    nl.bind((0, 0))
    reply = call(nl, GENL_ID_CTRL, CTRL_CMD_GETFAMILY, attribute(CTRL_ATTR_FAMILY_NAME, b"nbd\0"))
    (family,) = struct.unpack("=H", reply[CTRL_ATTR_FAMILY_ID])

    clients = []
    deadline = time.monotonic() + 60
    while len(clients) < int(count):
        client = None
        try:
            client = rawnbd.Client((host, int(port)), timeout_s=10)
            client.handshake()
            export = client.go(name)
            clients.append(client)
        except (OSError, rawnbd.Closed, rawnbd.OptionError):
            if client:
                client.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    sockets = b""
    for client in clients:
        # The kernel uses the socket as it is: no time limit of Python's on it.
        client.sock.settimeout(None)
        item = attribute(SOCK_FD, struct.pack("=L", client.sock.fileno()))
        sockets += attribute(SOCK_ITEM | NLA_F_NESTED, item)
    payload = attribute(ATTR_INDEX, struct.pack("=L", int(index)))
    if command == "connect":
        payload += attribute(ATTR_SIZE_BYTES, struct.pack("=Q", export.size))
        payload += attribute(ATTR_BLOCK_SIZE_BYTES, struct.pack("=Q", 512))
        payload += attribute(ATTR_SERVER_FLAGS, struct.pack("=Q", export.flags))
        payload += attribute(ATTR_DEAD_CONN_TIMEOUT, struct.pack("=Q", 120))
    # What was in flight on a connection that died is sent again only after this time.
    payload += attribute(ATTR_TIMEOUT, struct.pack("=Q", 5))
    payload += attribute(ATTR_SOCKETS | NLA_F_NESTED, sockets)
    call(nl, family, NBD_CMD_CONNECT if command == "connect" else NBD_CMD_RECONFIGURE, payload)


main()
