/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * SCTP's checksum, CRC32c (RFC 9260 section 6.8 and appendix A), of a packet of which ports have changed. A CRC is the
 * remainder of a division of polynomials over GF(2). So it changes by what the ports have changed by, times x to the
 * power of the bits from there to the packet's end, whatever these are.
 */
#pragma once

#include "icmp_error.h"
#include "parse.h"
#include "transport.h"

/* What x^32 leaves. The highest bit of a remainder is that of x^0, here and below. */
#define CRC32C_POLYNOMIAL 0x82f63b78ull

/* What x^(8 * 2^k) leaves, by k: what to multiply with for the bits of a number of bytes. */
#define CRC32C_POWERS                                                                                                  \
    {                                                                                                                  \
        0x00800000, 0x00008000, 0x82f63b78, 0x6ea2d55c, 0x18b8ea18, 0x510ac59a, 0xb82be955, 0xb8fdb1e7, 0x88e56f72,    \
            0x74c360a4, 0xe4172b16, 0x0d65762a, 0x35d73a62, 0x28461564, 0xbf455269, 0xe2ea32dc                         \
    }

/* Horner's scheme, from the highest power of x down, without a branch. */
static __u64 multiplied(__u64 a, __u64 b)
{
    __u64 product = 0;

#pragma nounroll
    for (__u64 bit = 0; bit < 32; bit++) {
        product = product >> 1 ^ (product & 1) * CRC32C_POLYNOMIAL;
        product ^= (b & 1) * a;
        b >>= 1;
    }
    return product;
}

/* What a remainder becomes with so many bytes behind it. An IP packet has no more than 65,535. */
static __u64 followed_by(__u64 remainder, __u32 bytes)
{
    const __u64 powers[] = CRC32C_POWERS;

#pragma unroll
    for (int bit = 0; bit < 16; bit++)
        if (bytes >> bit & 1)
            remainder = multiplied(remainder, powers[bit]);
    return remainder;
}

/* Between a packet's bytes and a number, both ways: CRCs take bytes, and are sent, with the lowest power last. */
static __u32 from_wire(__be32 word)
{
    return __builtin_bswap32(bpf_ntohl(word));
}

/*
 * Puts the CRC right after all changes of ports, also the one that an error quotes, if it is there. 0 stays 0: that is
 * what a pod's own kernel sends, which leaves the CRC to the device that the packet leaves by (CHECKSUM_PARTIAL,
 * sctp_packet_pack in Linux), and what those send who have agreed to have none (RFC 9653). Programs cannot tell either
 * from a CRC that happens to be 0. Such a packet, one of 2^32, is lost.
 */
static void settle_crc(struct __sk_buff *skb, const struct packet *packet, const struct transport *transport)
{
    __u32 offset = transport->crc_offset;
    __be32 old, new;

    if (!transport->ports_change || !offset || bpf_skb_load_bytes(skb, offset, &old, sizeof(old)) < 0 || !old)
        return;
    new = old ^ from_wire(followed_by(from_wire(transport->ports_change), transport->crc_bytes));
    bpf_skb_store_bytes(skb, offset, &new, sizeof(new), transport->quoted ? 0 : BPF_F_RECOMPUTE_CSUM);
    if (transport->quoted)
        bpf_l4_csum_replace(skb, packet->header_end + ICMP_CHECKSUM, old, new, sizeof(new));
}
