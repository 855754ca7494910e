/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Flows that outsiders open to a pod's own address: the pod's answers keep that address. */
#pragma once

#include "maps.h"
#include "parse.h"
#include "transport.h"

/* How old a note may become before it is renewed: not at every packet, which would share a cache line among CPUs. */
#define RENEW_NS 1000000000ull

#define SECOND_NS 1000000000ull

/* What neither begins a flow nor refuses one. */
static bool carries_on(const struct transport *transport)
{
    return !transport->quoted && !(transport->tcp_flags & TCP_RST) && !opens_connection(transport);
}

/*
 * A note that has been quiet for too long says nothing about a new flow with the same ports. With TCP the SYN tells new
 * from old, and a connection may be quiet for ever.
 */
static bool is_stale(__u64 age, __u8 protocol)
{
    __u32 zero = 0;
    struct settings *limits = settings.lookup(&zero);

    if (!limits)
        return false;
    switch (protocol) {
    case IPPROTO_TCP:
        return false;
    case IPPROTO_UDP:
        return age > SECOND_NS * limits->udp;
    case IPPROTO_ICMP:
    case IPPROTO_ICMPV6:
        return age > SECOND_NS * limits->icmp;
    default:
        return age > SECOND_NS * limits->other;
    }
}

static void renew(__u64 *seen, __u64 now)
{
    if (now - *seen > RENEW_NS)
        *seen = now;
}

/* Notes that an outsider has sent this: to a pod's own address, in a flow that the pod has not opened itself. */
static void note_inbound(const struct transport *transport)
{
    struct tuple answer = reversed(&transport->tuple);
    __u64 now = bpf_ktime_get_coarse_ns(), *known = conversations.lookup(&answer);

    if (known) {
        renew(known, now);
        return;
    }
    struct note *note = inbound.lookup(&answer);
    if (note && note->answered && carries_on(transport)) {
        conversations.update(&answer, &now);
        inbound.delete(&answer);
    } else if (note) {
        renew(&note->seen, now);
    } else if (!transport->quoted && !flows.lookup(&answer)) {
        struct note first = {.seen = now};
        inbound.update(&answer, &first);
    }
}

/* When the outsider, or the pod in answer, last sent something in this flow of a pod's; 0 if no outsider did. */
static __u64 *last_inbound(struct transport *transport)
{
    __u64 *seen = conversations.lookup(&transport->tuple);
    struct note *note;

    if (seen)
        return seen;
    note = inbound.lookup(&transport->tuple);
    if (!note)
        return 0;
    if (!note->answered && carries_on(transport))
        note->answered = 1;
    return &note->seen;
}

/*
 * Does this packet of a pod's answer a flow that an outsider opened? Only if the pod has not opened it itself: a stale
 * or forged note must never let a masqueraded flow out under the pod's own address. Nor is it an answer if this is an
 * error about another pod's flow.
 */
static bool is_reply(const struct packet *packet, struct transport *transport)
{
    struct tuple *key = &transport->tuple;
    __u64 now = bpf_ktime_get_coarse_ns(), *seen = last_inbound(transport);

    if (!seen || opens_connection(transport) || flows.lookup(key) || !same_address(&key->source, &packet->source) ||
        is_stale(now - *seen, key->protocol))
        return false;
    renew(seen, now);
    return true;
}

/* The pod has opened that flow itself: a note would outlive it, and let what comes after it out as it is. */
static void forget_inbound(struct tuple *tuple)
{
    inbound.delete(tuple);
    conversations.delete(tuple);
}
