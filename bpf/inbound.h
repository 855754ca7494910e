/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Flows that others open to a pod's own address or to a host port: the pod's answers come from there. */
#pragma once

#include "maps.h"
#include "parse.h"
#include "transport.h"

/* How old a note may become before it is renewed: not at every packet, which would share a cache line among CPUs. */
#define RENEW_NS 1000000000ull

#define SECOND_NS 1000000000ull

/* How far a note has come. */
#define ANSWERED   1
#define CARRIED_ON 2 /* it is in `conversations` */

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

/* The note by the tuple of the pod's answers. */
static struct note *find_note(struct tuple *answer)
{
    return conversations.lookup(answer) ?: inbound.lookup(answer);
}

/* One sender's flows to several ports of the node's may look the same to the pod. The one that opened last counts. */
static void know_as(struct note *note, const struct transport *transport, const struct addr *address, __be16 port)
{
    if (note->port == port && (!port || same_address(&note->address, address)))
        return;
    if (transport->quoted || (transport->tuple.protocol == IPPROTO_TCP && !opens_connection(transport)))
        return;
    note->address = *address;
    note->port = port;
}

/*
 * Notes that a packet of this kind has come, whose answers are `answer`, in a flow that the pod has not opened itself:
 * to its own address (port 0), or to that address and port of the node's.
 */
static void note_inbound(const struct transport *transport, struct tuple *answer, const struct addr *address,
                         __be16 port)
{
    __u64 now = bpf_ktime_get_coarse_ns();
    struct note *note = find_note(answer);

    if (note) {
        know_as(note, transport, address, port);
        renew(&note->seen, now);
        if (note->answered == ANSWERED && carries_on(transport)) {
            note->answered = CARRIED_ON; /* so that it moves once */
            conversations.update(answer, note);
            inbound.delete(answer);
        }
    } else if (!transport->quoted && !flows.lookup(answer)) {
        struct note first = {.seen = now, .address = *address, .port = port};
        inbound.update(answer, &first);
    }
}

static void note_direct(const struct transport *transport)
{
    struct tuple answer = reversed(&transport->tuple);

    note_inbound(transport, &answer, &transport->tuple.destination, 0);
}

/* The note of the flow that a pod's packet belongs to, if others have opened it; it learns that the pod has answered.
 */
static struct note *answered_note(struct transport *transport)
{
    struct note *note = find_note(&transport->tuple);

    if (note && !note->answered && carries_on(transport))
        note->answered = ANSWERED;
    return note;
}

/*
 * The note of the flow that this packet of a pod's answers, if another opened it. Only if the pod has not opened it
 * itself: a stale or forged note must never let a masqueraded flow out under the pod's own address. Nor is it an answer
 * if this is an error about another pod's flow.
 */
static struct note *reply_note(const struct packet *packet, struct transport *transport)
{
    struct tuple *key = &transport->tuple;
    __u64 now = bpf_ktime_get_coarse_ns();
    struct note *note = answered_note(transport);

    if (!note || opens_connection(transport) || flows.lookup(key) || !same_address(&key->source, &packet->source) ||
        is_stale(now - note->seen, key->protocol))
        return 0;
    renew(&note->seen, now);
    return note;
}

/* The pod has opened that flow itself: a note would outlive it, and let what comes after it out as it is. */
static void forget_inbound(struct tuple *tuple)
{
    inbound.delete(tuple);
    conversations.delete(tuple);
}
