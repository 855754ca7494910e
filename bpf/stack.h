/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Flows that belong to the host stack. A reply follows its request: see `stack_flows` in maps.h. */
#pragma once

#include "identify.h"
#include "maps.h"
#include "mark.h"
#include "transport.h"

/*
 * In skb->cb[0], for to_uplink's other copy: while the agent moves it from a filter to a link, a packet may pass both,
 * and to the second it would look like one of the node's own, or of the stack's. The IP layers overwrite it.
 */
#define SEEN 0x706c6f6b

/* Notes that the answers to this packet belong to the stack; errors have none. */
static void keep_in_stack(struct transport *transport, struct endpoint *pod)
{
    if (transport->quoted)
        return;
    struct tuple answer = reversed(&transport->tuple);
    __u64 now = bpf_ktime_get_coarse_ns();

    if (!stack_flows.lookup(&answer)) /* an update costs more, and looking is enough to stay recent */
        stack_flows.update(&answer, &now);
    if (!pod->via_stack)
        pod->via_stack = 1;
}

/* Does this packet belong to the stack? All fragments of a datagram must take one way, so all of a pod's do. */
static bool is_stack_flow(struct __sk_buff *skb, const struct packet *packet)
{
    struct transport *transport = new_transport();

    return packet->is_fragment ||
           (transport && identify(skb, packet, transport) && stack_flows.lookup(&transport->tuple));
}
