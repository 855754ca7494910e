/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Flows that outsiders open to a pod's own address: the pod's answers keep that address. */
#pragma once

#include "maps.h"
#include "parse.h"
#include "transport.h"

/* How old a note may become before it is renewed: not at every packet, which would share a cache line among CPUs. */
#define RENEW_NS 1000000000ull

#define SECOND_NS 1000000000ull

static bool opens_connection(const struct transport *transport)
{
    return (transport->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/*
 * A note that has been quiet for too long says nothing about a new flow with the same ports. With TCP the SYN tells new
 * from old, and a connection may be quiet for ever.
 */
static bool is_stale(__u64 age, __u8 protocol)
{
    __u32 zero = 0;
    struct settings *limits = settings.lookup(&zero);

    if (protocol == IPPROTO_TCP || !limits)
        return false;
    return age > SECOND_NS * (protocol == IPPROTO_UDP ? limits->udp : limits->icmp);
}

/* Notes that an outsider has sent this: to a pod's own address, in a flow that the pod has not opened itself. */
static void note_inbound(const struct transport *transport)
{
    struct tuple answer = reversed(&transport->tuple);
    __u64 now = bpf_ktime_get_coarse_ns(), *seen = inbound.lookup(&answer);

    if (seen && now - *seen > RENEW_NS)
        *seen = now;
    if (!seen && !transport->quoted && !flows.lookup(&answer))
        inbound.update(&answer, &now);
}

/*
 * Does this packet of a pod's answer a flow that an outsider opened? Only if the pod has not opened it itself: a stale
 * or forged note must never let a masqueraded flow out under the pod's own address. Nor is it an answer if this is an
 * error about another pod's flow.
 */
static bool is_reply(const struct packet *packet, const struct transport *transport)
{
    struct tuple key = transport->tuple;
    __u64 now = bpf_ktime_get_coarse_ns(), *seen = inbound.lookup(&key);

    if (!seen || opens_connection(transport) || flows.lookup(&key) || !same_address(&key.source, &packet->source))
        return false;
    __u64 age = now - *seen;
    if (is_stale(age, key.protocol))
        return false;
    if (age > RENEW_NS)
        *seen = now;
    return true;
}

/* The pod has opened that flow itself: a note would outlive it, and let what comes after it out as it is. */
static void forget_inbound(const struct tuple *tuple)
{
    struct tuple key = *tuple;

    inbound.delete(&key);
}
