"""X25519, HKDF-SHA256 and ChaCha20 again, in plain Python from their RFCs."""

import hashlib
import hmac
import struct

P = 2**255 - 19


def x25519(private: bytes, public: bytes) -> bytes:
    """Return the shared secret of RFC 7748, section 5."""
    scalar = bytearray(private)
    scalar[0] &= 248
    scalar[31] = scalar[31] & 127 | 64
    k = int.from_bytes(scalar, "little")
    u = int.from_bytes(public, "little") & (2**255 - 1)
    x2, z2, x3, z3, swap = 1, 0, u, 1, 0
    for t in reversed(range(255)):
        bit = k >> t & 1
        if swap ^ bit:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swap = bit
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a % P, b * b % P, d * a % P, c * b % P
        e = aa - bb
        x3, z3 = (da + cb) ** 2 % P, u * (da - cb) ** 2 % P
        x2, z2 = aa * bb % P, e * (aa + 121665 * e) % P
    if swap:
        x2, z2 = x3, z3
    return (x2 * pow(z2, P - 2, P) % P).to_bytes(32, "little")


def public_of(private: bytes) -> bytes:
    """Return the public key of a private key."""
    return x25519(private, (9).to_bytes(32, "little"))


def hkdf(secret: bytes, info: bytes, length: int = 32) -> bytes:
    """Return the key of RFC 5869, without salt."""
    key = hmac.new(bytes(32), secret, hashlib.sha256).digest()
    block, out = b"", b""
    for i in range(1, -(-length // 32) + 1):
        block = hmac.new(key, block + info + bytes([i]), hashlib.sha256).digest()
        out += block
    return out[:length]


def chacha20(key: bytes, length: int) -> bytes:
    """Return the key stream of RFC 8439, section 2.4, of counter and nonce 0."""
    out = b""
    counter = 0
    while len(out) < length:
        first = (
            *(0x61707865, 0x3320646E, 0x79622D32, 0x6B206574),
            *struct.unpack("<8I", key),
            *(counter, 0, 0, 0),
        )
        state = list(first)
        for _ in range(10):
            for a, b, c, d in (
                *((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)),
                *((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)),
            ):
                for x, y, z, turn in ((a, b, d, 16), (c, d, b, 12)):
                    _half(state, x, y, z, turn)
                for x, y, z, turn in ((a, b, d, 8), (c, d, b, 7)):
                    _half(state, x, y, z, turn)
        mixed = [(s + f) % 2**32 for s, f in zip(state, first, strict=True)]
        out += struct.pack("<16I", *mixed)
        counter += 1
    return out[:length]


def _half(state: list[int], x: int, y: int, z: int, turn: int) -> None:
    state[x] = (state[x] + state[y]) % 2**32
    mixed = state[z] ^ state[x]
    state[z] = (mixed << turn | mixed >> (32 - turn)) % 2**32


def encoded(statement: str, *parts: bytes) -> bytes:
    """Return what `statements.encoded` documents."""
    out = b""
    for part in (b"clip2fl secure aggregation 1", statement.encode(), *parts):
        out += struct.pack(">Q", len(part)) + part
    return out
