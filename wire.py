"""What travels: a packet (M, d_z) as bytes, and back. len(payload) is the size that every table reports; nothing is left unpaid.

    header 16 bytes | fp16 scales, one for each group of 32 values | integers of 8, 6 or 4 bits, packed        32 and 16 bits: plain floats

Read next: latentwire.py, whose models see what `decode` returns.
"""

import struct

import numpy as np
import torch

HEADER = struct.Struct("<4sBBHHHI")  # magic, version, bits, group, M, d_z, count: 16 bytes
MAGIC, VERSION, GROUP = b"LWIR", 1, 32
WIDTHS = (32, 16, 8, 6, 4)


def scales_of(amax, qmax):
    """fp16 scales as stored, rounded towards zero: then scale <= amax / qmax and the error stays below amax / (2 qmax)."""
    exact = amax / qmax
    half = exact.astype(np.float16)
    return np.where(half.astype(np.float32) > exact, np.nextafter(half, np.float16(0)), half)


def encode(z, bits: int) -> bytes:
    """(M, d_z) -> the bytes that travel. 32 and 16 are floats; below, groups of 32 values share a scale."""
    z = np.ascontiguousarray(torch.as_tensor(z).detach().float().cpu().numpy())
    if bits not in WIDTHS or z.ndim != 2 or max(z.shape) > 65535 or not np.isfinite(z).all():
        raise ValueError(f"cannot send bits={bits}, shape {z.shape}: bits in {WIDTHS}, (M, d_z) up to 65535, finite values")
    header, flat = HEADER.pack(MAGIC, VERSION, bits, GROUP, *z.shape, z.size), z.reshape(-1)
    if bits == 32:
        return header + flat.astype("<f4").tobytes()
    qmax = 2 ** (bits - 1) - 1
    if np.abs(flat).max(initial=0) > 65504 * (1 if bits == 16 else qmax):
        raise ValueError(f"{np.abs(flat).max():g} does not fit fp16 {'values' if bits == 16 else 'scales'}; send 32 bits")
    if bits == 16:
        return header + flat.astype("<f2").tobytes()
    groups = np.pad(flat, (0, -len(flat) % GROUP)).reshape(-1, GROUP)
    scale = scales_of(np.abs(groups).max(1, initial=0), qmax)  # (G,)
    step = scale.astype(np.float32)[:, None]
    q = np.clip(np.rint(np.divide(groups, step, out=np.zeros_like(groups), where=step > 0)), -qmax, qmax).astype(np.int64)
    raised = (q.reshape(-1)[: len(flat)] + qmax).astype(np.uint8)  # 0 .. 2 qmax
    packed = np.packbits(np.unpackbits(raised[:, None], axis=1)[:, 8 - bits :])
    return header + scale.astype("<f2").tobytes() + packed.tobytes()


def decode(payload: bytes) -> torch.Tensor:
    """The bytes -> (M, d_z) fp32, exactly what every model gets to see. Anything but a whole packet of ours is refused."""
    if len(payload) < HEADER.size:
        raise ValueError(f"a packet has a header of {HEADER.size} bytes, this one has {len(payload)} bytes in all")
    magic, version, bits, group, m, d, count = HEADER.unpack_from(payload)
    if (magic, version, group) != (MAGIC, VERSION, GROUP) or bits not in WIDTHS or count != m * d:
        raise ValueError(f"not a packet: magic {magic!r}, version {version}, bits {bits}, group {group}, {m} x {d} != {count}?")
    n_groups, body = -(-count // GROUP) if bits < 16 else 0, payload[HEADER.size :]
    if len(body) != 2 * n_groups + -(-count * bits // 8):
        raise ValueError(f"a packet of {count} values at {bits} bits has {2 * n_groups + -(-count * bits // 8)} bytes, not {len(body)}")
    if bits >= 16:
        flat = np.frombuffer(body, f"<f{bits // 8}").astype(np.float32)
    else:
        scale = np.frombuffer(body[: 2 * n_groups], "<f2").astype(np.float32)
        ones, rest = np.split(np.unpackbits(np.frombuffer(body[2 * n_groups :], np.uint8)), [count * bits])
        q = (ones.reshape(count, bits) @ (1 << np.arange(bits - 1, -1, -1))).astype(np.float32) - (2 ** (bits - 1) - 1)
        if (q >= 2 ** (bits - 1)).any() or np.signbit(scale).any() or rest.any():
            raise ValueError("not a packet: no encoder writes such a value, scale or last byte")
        flat = q * np.repeat(scale, GROUP)[:count]
    if not np.isfinite(flat).all():
        raise ValueError("the packet holds values that are not finite")
    return torch.from_numpy(flat.reshape(m, d).copy())


def over_wire(z, z_cu, bits):
    """encode then decode, packet by packet; the gradient passes straight through (z - z.detach() is zero)."""
    if not bits or not torch.isfinite(z).all():  # what is not finite is the loop's to refuse
        return z
    packets = [decode(encode(part, bits)) for part in z.split(z_cu.diff().tolist())]
    return torch.cat(packets).to(z) + (z - z.detach())
