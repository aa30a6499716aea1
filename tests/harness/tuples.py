"""FoundationDB's tuples, as far as keys use them, and the way fdbcli writes keys."""


def unescape(text):
    r"""The bytes that fdbcli shows as text: \xNN and \\ stand for themselves."""
    raw, out, at = text.encode("utf-8", "surrogateescape"), bytearray(), 0
    while at < len(raw):
        if raw[at:at + 2] == b"\\x":
            out.append(int(raw[at + 2:at + 4], 16))
            at += 4
        elif raw[at:at + 2] == b"\\\\":
            out.append(0x5C)
            at += 2
        else:
            out.append(raw[at])
            at += 1
    return bytes(out)


def escape(data):
    """For a key or value in a command of fdbcli's."""
    return "".join(f"\\x{b:02x}" for b in data)


def unpack(key):
    """The elements: texts, byte strings and integers."""
    out, at = [], 0
    while at < len(key):
        kind = key[at]
        at += 1
        if kind in (1, 2):
            raw = bytearray()
            while True:
                end = key.index(0, at)
                raw += key[at:end]
                at = end + 1
                if key[at:at + 1] != b"\xff":
                    break
                raw.append(0)
                at += 1
            out.append(bytes(raw) if kind == 1 else raw.decode())
        elif 0x14 <= kind <= 0x1C:
            size = kind - 0x14
            out.append(int.from_bytes(key[at:at + size], "big"))
            at += size
        else:
            raise ValueError(f"element of type {kind:#x} in {key!r}")
    return tuple(out)


def pack(*elements):
    out = bytearray()
    for e in elements:
        if isinstance(e, int):
            raw = e.to_bytes((e.bit_length() + 7) // 8, "big")
            out += bytes([0x14 + len(raw)]) + raw
        else:
            text = isinstance(e, str)
            raw = e.encode() if text else e
            out += bytes([2 if text else 1]) + raw.replace(b"\0", b"\0\xff") + b"\0"
    return bytes(out)
