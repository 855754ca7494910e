/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Which flow an IP packet belongs to, whatever it is: a whole packet, a fragment, or an ICMP error about one. */
#pragma once

#include "fragments.h"
#include "icmp_error.h"
#include "parse.h"
#include "transport.h"

/* The same as `identify`, but for errors. */
static bool identify_itself(struct __sk_buff *skb, const struct packet *packet, struct transport *transport)
{
    transport->tuple.source = packet->source;
    transport->tuple.destination = packet->destination;
    transport->tuple.protocol = packet->protocol;
    if (packet->is_fragment)
        return identify_fragment(skb, packet, transport);
    return parse_ports(skb, packet, transport, packet->header_end) && transport->complete;
}

/* Fills in the transport part; false if the flow cannot be told, as the packet's kind has no ports or hides them. */
static bool identify(struct __sk_buff *skb, const struct packet *packet, struct transport *transport)
{
    return identify_itself(skb, packet, transport) || (!packet->is_fragment && identify_error(skb, packet, transport));
}
