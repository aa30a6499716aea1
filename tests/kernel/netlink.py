#!/usr/bin/python3
"""Attaches a volume so that the kernel waits for its server to come back.

Runs in the guest. The kernel can keep a device, and the requests in flight, while
it has no connection (dead connection timeout) and take a new socket for it later
(reconfigure); it then sends again whatever was not answered. nbd-client 3.24 asks
for neither, so this speaks the kernel's nbd netlink interface itself.

  netlink.py connect INDEX HOST PORT NAME CONNECTIONS
  netlink.py reconnect INDEX HOST PORT NAME CONNECTIONS
  netlink.py keep INDEX HOST PORT NAME

keep does it for a device that nbd-client attached: it listens for connections that the kernel
says are dead, and replaces each, until it is ended.
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
CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME, CTRL_ATTR_MCAST_GROUPS = 1, 2, 7
CTRL_ATTR_MCAST_GRP_ID = 2
NLA_F_NESTED = 0x8000
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP = 270, 1

NBD_CMD_CONNECT, NBD_CMD_RECONFIGURE, NBD_CMD_LINK_DEAD = 1, 3, 4
(ATTR_INDEX, ATTR_SIZE_BYTES, ATTR_BLOCK_SIZE_BYTES, ATTR_TIMEOUT, ATTR_SERVER_FLAGS,
 ATTR_CLIENT_FLAGS, ATTR_SOCKETS, ATTR_DEAD_CONN_TIMEOUT) = range(1, 9)
SOCK_ITEM, SOCK_FD = 1, 1


def attribute(kind, data):
    out = struct.pack("=HH", len(data) + 4, kind) + data
    return out + bytes(-len(out) % 4)


def attributes(data):
    """kind -> bytes; of several with one kind the last."""
    found, at = {}, 0
    while at < len(data):
        size, kind = struct.unpack_from("=HH", data, at)
        found[kind & 0x3FFF] = data[at + 4:at + size]
        at += (size + 3) & ~3
    return found


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
            found.update(attributes(data[20:length]))
            data = data[(length + 3) & ~3:]


def connections(host, port, name, count):
    """So many connections that have reached transmission, and the export they are to."""
    clients = []
    deadline = time.monotonic() + 60
    while len(clients) < count:
        client = None
        try:
            client = rawnbd.Client((host, int(port)), timeout_s=5)
            client.handshake()
            export = client.go(name)
            clients.append(client)
        except (OSError, rawnbd.Closed, rawnbd.OptionError):
            if client:
                client.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    for client in clients:
        # The kernel uses the socket as it is: no time limit of Python's on it.
        client.sock.settimeout(None)
    return clients, export


def sockets(clients):
    items = b""
    for client in clients:
        item = attribute(SOCK_FD, struct.pack("=L", client.sock.fileno()))
        items += attribute(SOCK_ITEM | NLA_F_NESTED, item)
    return attribute(ATTR_SOCKETS | NLA_F_NESTED, items)


def keep(nl, family, groups, index, *server):
    (group,) = struct.unpack("=L", attributes(attributes(groups)[1])[CTRL_ATTR_MCAST_GRP_ID])
    events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC)
    events.bind((0, 0))
    events.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
    device = attribute(ATTR_INDEX, struct.pack("=L", int(index)))
    call(nl, family, NBD_CMD_RECONFIGURE,
         device + attribute(ATTR_DEAD_CONN_TIMEOUT, struct.pack("=Q", 600)))
    print("keeping", flush=True)
    while True:
        data = events.recv(65536)
        (command,) = struct.unpack_from("=B", data, 16)
        (which,) = struct.unpack("=L", attributes(data[20:])[ATTR_INDEX])
        if command != NBD_CMD_LINK_DEAD or which != int(index):
            continue
        clients, _ = connections(*server, 1)
        call(nl, family, NBD_CMD_RECONFIGURE, device + sockets(clients))
        clients[0].close()


def main():
    command, index, *server = sys.argv[1:]
    nl = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC)
    nl.bind((0, 0))
    reply = call(nl, GENL_ID_CTRL, CTRL_CMD_GETFAMILY, attribute(CTRL_ATTR_FAMILY_NAME, b"nbd\0"))
    (family,) = struct.unpack("=H", reply[CTRL_ATTR_FAMILY_ID])
    if command == "keep":
        keep(nl, family, reply[CTRL_ATTR_MCAST_GROUPS], index, *server)

    clients, export = connections(*server[:3], int(server[3]))
    payload = attribute(ATTR_INDEX, struct.pack("=L", int(index)))
    if command == "connect":
        payload += attribute(ATTR_SIZE_BYTES, struct.pack("=Q", export.size))
        payload += attribute(ATTR_BLOCK_SIZE_BYTES, struct.pack("=Q", 512))
        payload += attribute(ATTR_SERVER_FLAGS, struct.pack("=Q", export.flags))
        payload += attribute(ATTR_DEAD_CONN_TIMEOUT, struct.pack("=Q", 120))
    # What was in flight on a connection that died is sent again only after this time.
    payload += attribute(ATTR_TIMEOUT, struct.pack("=Q", 5))
    payload += sockets(clients)
    call(nl, family, NBD_CMD_CONNECT if command == "connect" else NBD_CMD_RECONFIGURE, payload)


main()
