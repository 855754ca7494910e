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

/*
 * How a packet belongs to the stack: in a flow that the stack brought, or as a request whose answers would be taken for
 * those. That is a flow of its own, such as a direct call from a port that has called a service before. Only conntrack
 * can tell the two apart, and only if it sees both ways.
 */
#define STACK_ANSWER  1
#define STACK_REQUEST 2

static __u32 way_by_stack(const struct tuple *tuple)
{
    struct tuple answer = reversed(tuple);

    if (stack_flows.lookup((struct tuple *)tuple))
        return STACK_ANSWER;
    return stack_flows.lookup(&answer) ? STACK_REQUEST : 0;
}

/* Does this packet belong to the stack? All fragments of a datagram must take one way, so all of a pod's do. */
static __u32 is_stack_flow(struct __sk_buff *skb, const struct packet *packet)
{
    if (packet->is_fragment)
        return STACK_ANSWER;
    struct transport *transport = new_transport();
    return transport && identify(skb, packet, transport) ? way_by_stack(&transport->tuple) : 0;
}
