"""Two gateways, their cluster and a client, each on a network of its own.

    client ── tap0 ─┐                  ┌─ eth1 ── gateway 1 ── eth2 ─┐
                    ├─ bridge "front" ─┤                             ├─ bridge "back" ── cluster
                    └──────────────────┴─ eth1 ── gateway 2 ── eth2 ─┘

Each gateway and the cluster is in a network namespace; both bridges are switches, and cutting
a gateway off is pulling its cable there: what it sends is lost without a word. The client
knows the service address only, which is an address more on one of the gateways.
"""

import sys

from harness import netns

CLIENT = "10.99.0.2"
SERVICE = "10.99.0.10"
BACK = "10.98.0.1"
PORT = 10809

# An ARP reply to everybody: whoever knows the address learns where it is now.
ANNOUNCE = """
import socket, struct, sys
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind((sys.argv[1], 0x0806))
mac, ip, all_ = s.getsockname()[4], socket.inet_aton(sys.argv[2]), bytes([255] * 6)
for operation in (1, 2):
    s.send(all_ + mac + struct.pack(">HHHBBH", 0x0806, 1, 0x0800, 6, 4, operation)
           + mac + ip + all_ + ip)
"""


class Network:
    """gateways  the namespaces of the two gateways
    front     where the client's tap device is
    back      where the cluster is
    """

    def __init__(self):
        self.made = []
        self.front = self._namespace()
        self.back = self._namespace()
        self.gateways = []
        self.front.run("ip link add front type bridge")
        self.front.run("ip link set front up")
        self.front.run("ip tuntap add dev tap0 mode tap")
        self.front.run("ip link set tap0 master front up")
        self.back.run("ip link add back type bridge")
        self.back.run(f"ip addr add {BACK}/24 dev back")
        self.back.run("ip link set back up")
        for n in (1, 2):
            one = self._namespace()
            self.gateways.append(one)
            self._cable(one, "eth1", self.front, "front", n, f"10.99.0.{10 + n}")
            self._cable(one, "eth2", self.back, "back", n, f"10.98.0.{10 + n}")

    def _namespace(self):
        one = netns.Namespace(self.made[0] if self.made else None)
        self.made.append(one)
        return one

    @staticmethod
    def _cable(gateway, name, switch, bridge, n, address):
        switch.run(f"ip link add port{n} type veth peer name {name}")
        switch.run(f"ip link set {name} netns {gateway.holder.pid}")
        switch.run(f"ip link set port{n} master {bridge} up")
        gateway.run(f"ip addr add {address}/24 dev {name}")
        gateway.run(f"ip link set {name} up")

    def cut_from_cluster(self, n):
        """Silently: the gateway's own link stays up."""
        self.back.run(f"ip link set port{n + 1} nomaster")

    def cut_from_clients(self, n):
        self.front.run(f"ip link set port{n + 1} nomaster")

    def join_cluster(self, n):
        self.back.run(f"ip link set port{n + 1} master back")

    def give_service(self, n):
        """Puts the service address on gateway `n` and tells everybody, as a VIP manager would."""
        one = self.gateways[n]
        one.run(f"ip addr add {SERVICE}/24 dev eth1")
        one.run([sys.executable, "-c", ANNOUNCE, "eth1", SERVICE])

    def take_service(self, n):
        self.gateways[n].run(f"ip addr del {SERVICE}/24 dev eth1")

    def restore(self):
        """All cables in place, the service address nowhere."""
        for n, one in enumerate(self.gateways):
            self.front.run(f"ip link set port{n + 1} master front")
            self.join_cluster(n)
            if SERVICE in one.run("ip -4 -brief addr show eth1", capture_output=True,
                                  text=True).stdout:
                self.take_service(n)

    def end(self):
        for one in reversed(self.made):
            one.end()
