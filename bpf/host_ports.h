/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Host ports: ports of the node's that lead to pods. What comes is given the pod's address, and a note says where the
 * answers come from (inbound.h). There is no other state, so a flood from outside cannot take room from masquerading.
 */
#pragma once

#include "crc.h"
#include "icmp_error.h"
#include "identify.h"
#include "inbound.h"
#include "maps.h"
#include "mark.h"
#include "parse.h"
#include "ports.h"
#include "rewrite.h"
#include "transport.h"

/* Where a packet leads, if it is for a host port. */
static struct pod_port *find_host_port(const struct packet *packet, const struct transport *transport)
{
    struct host_port key = {
        .address = packet->destination,
        .port = transport->tuple.destination_port,
        .protocol = transport->tuple.protocol,
    };

    if (!node_addresses.lookup(&key.address) || is_link_local(&packet->source) || is_link_local(&key.address))
        return 0; /* no pod can answer a link-local address: its link is another */
    return leads_to(&key);
}

/* Lets what a pod answers come from where its note says; false if it says nothing, or the packet cannot be changed. */
static bool answer_as_noted(struct __sk_buff *skb, struct packet *packet, struct transport *transport,
                            const struct note *note)
{
    struct addr address = note->address; /* read once: when the entry goes, another flow may get its memory */
    __be16 port = note->port;

    if (!port)
        return false;
    return transport->quoted ? rewrite_error(skb, packet, transport, SIDE_SOURCE, &address, port) == 0
                             : rewrite_source(skb, packet, transport, &address, port) == 0;
}

/*
 * Does this packet belong to a connection of the node's own, from that port? It stays the node's; a socket that only
 * listens there does not count.
 */
static bool is_nodes_own(struct __sk_buff *skb, const struct transport *transport, struct tuple *answer)
{
    return !find_note(answer) && has_socket(skb, &transport->tuple, true);
}

/* What an outsider sends to a host port, or an error about what came from there: true if it now is for the pod. */
static bool to_host_port(struct __sk_buff *skb, struct packet *packet, struct transport *transport)
{
    struct pod_port *found = find_host_port(packet, transport);

    if (!found)
        return false;
    struct tuple answer = reversed(&transport->tuple);
    answer.source = found->address;
    answer.source_port = found->port;
    if (is_nodes_own(skb, transport, &answer))
        return false;
    note_inbound(transport, &answer, &packet->destination, transport->tuple.destination_port);
    remember_ports(transport);
    if (transport->quoted ? rewrite_error(skb, packet, transport, SIDE_DESTINATION, &answer.source, answer.source_port)
                          : rewrite_destination(skb, packet, transport, &answer.source, answer.source_port))
        return false;
    packet->destination = transport->tuple.destination = answer.source;
    transport->tuple.destination_port = answer.source_port;
    return true;
}

/*
 * What a pod sends to a host port of its own node: `meant` becomes what the serving pod is to see. A pod that calls
 * itself hears the node: no kernel takes what seems to come from itself. The note is of the pods' own addresses.
 */
static bool call_locally(struct __sk_buff *skb, const struct packet *packet, const struct transport *transport,
                         struct tuple *meant)
{
    struct pod_port *found = find_host_port(packet, transport);

    if (!found)
        return false;
    struct endpoint *server = endpoints.lookup(&found->address);
    if (!server || server->network != packet->network)
        return false;
    meant->destination = found->address;
    meant->destination_port = found->port;
    struct tuple answer = reversed(meant);
    if (is_nodes_own(skb, transport, &answer))
        return false;
    if (same_address(&found->address, &packet->source))
        meant->source = packet->destination;
    note_inbound(transport, &answer, &packet->destination, transport->tuple.destination_port);
    return true;
}

/* What a pod answers to another of this node, or to itself: `meant` becomes what the one that called is to see. */
static bool answer_locally(const struct packet *packet, struct transport *transport, bool to_pod, struct tuple *meant)
{
    if (!to_pod) {
        if (!node_addresses.lookup(&transport->tuple.destination))
            return false; /* to_uplink does it */
        transport->tuple.destination = packet->source;
    }
    struct note *note = reply_note(packet, transport);
    transport->tuple.destination = packet->destination;
    if (!note || !note->port || (!to_pod && !same_address(&note->address, &packet->destination)))
        return false;
    if (!to_pod)
        meant->destination = packet->source;
    meant->source = note->address;
    meant->source_port = note->port;
    return true;
}

/* A flow to a pod's own address may begin here: a note of one to a host port, with the same ports, is over then. */
static void forget_host_port(struct transport *transport)
{
    if (transport->quoted || (transport->tuple.protocol == IPPROTO_TCP && !opens_connection(transport)))
        return;
    struct tuple answer = reversed(&transport->tuple);
    struct note *note = find_note(&answer);
    if (note && note->port)
        forget_inbound(&answer);
}

/* The same for a flow of the node's own, which looks to the pod like one that it has with itself by a host port. */
static void forget_own_call(struct transport *transport)
{
    transport->tuple.source = transport->tuple.destination;
    forget_host_port(transport);
}

/*
 * What a pod sends to a host port of its own node, or answers from one: the mark that says which, or 0 if it is neither
 * and was not changed. `receiver` is whose address the destination is, if it is a pod's. What a limited pod sends
 * or gets keeps its source for the time being (mark.h). Errors stay as they are: their way back has no other MTU.
 */
static __u32 translate_locally(struct __sk_buff *skb, struct packet *packet, const struct endpoint *receiver)
{
    struct transport *transport = new_transport();
    __u32 mark = ANSWER_MARK;

    if (!transport || !identify_itself(skb, packet, transport))
        return 0;
    struct tuple meant = transport->tuple;
    remember_ports(transport);
    if (!(packet->serves && answer_locally(packet, transport, receiver, &meant))) {
        mark = CALL_MARK;
        if (receiver && receiver->serves)
            forget_host_port(transport);
        if (receiver || !call_locally(skb, packet, transport, &meant))
            return 0;
    }
    struct endpoint *next = endpoints.lookup(&meant.destination);
    bool is_limited = packet->shaper || (next && next->shaper);
    if ((!is_limited && rewrite_source(skb, packet, transport, &meant.source, meant.source_port)) ||
        rewrite_destination(skb, packet, transport, &meant.destination, meant.destination_port))
        return 0;
    settle_crc(skb, packet, transport);
    packet->destination = meant.destination;
    return mark;
}

/* Is it worth a closer look? What only the stack understands is left as it is. */
static bool may_be_served(const struct __sk_buff *skb, const struct packet *packet, const struct endpoint *receiver)
{
    struct addr destination = packet->destination;

    if (packet->ttl <= 1 || packet->has_options || skb->pkt_type != PACKET_HOST)
        return false;
    return packet->serves || (receiver ? receiver->serves : node_addresses.lookup(&destination) != 0);
}

/* The rest of `translate_locally` for what a limited pod has sent: its source, at the receiver's host end. */
static bool complete_locally(struct __sk_buff *skb)
{
    struct packet *packet = new_packet();
    struct transport *transport = new_transport();
    bool is_answer = skb->mark == ANSWER_MARK;

    skb->mark = 0;
    if (!packet || !transport || parse(skb, packet) != KIND_IP || !identify_itself(skb, packet, transport))
        return false;
    remember_ports(transport);
    if (!is_answer && !same_address(&packet->source, &packet->destination))
        return true; /* of all calls, only a pod's own to itself comes from elsewhere */
    struct tuple answer = is_answer ? transport->tuple : reversed(&transport->tuple);
    struct note *note = find_note(&answer);
    if (!note || !note->port)
        return false;
    struct addr address = note->address;
    __be16 port = is_answer ? note->port : transport->tuple.source_port;
    int failed = rewrite_source(skb, packet, transport, &address, port);
    settle_crc(skb, packet, transport);
    return failed == 0;
}
