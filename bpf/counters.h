/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Verdicts. Each counts one outcome, so that every path through a program ends in exactly one of them. */
#pragma once

#include "maps.h"

/* Names a member of struct outcomes. */
#define OUTCOME(name) __builtin_offsetof(struct outcomes, name)

static void count(struct __sk_buff *skb, __u64 outcome)
{
    __u32 zero = 0;
    struct outcomes *all = outcomes.lookup(&zero);

    if (!all)
        return;
    struct counter *counter = (void *)all + outcome;
    counter->packets++;
    counter->bytes += skb->len;
}

/* To the host stack, by way of whatever other programs are attached here (TC_ACT_UNSPEC is "next" in tcx). */
static int punt(struct __sk_buff *skb, __u64 outcome)
{
    count(skb, outcome);
    return TC_ACT_UNSPEC;
}

static int drop(struct __sk_buff *skb, __u64 outcome)
{
    count(skb, outcome);
    return TC_ACT_SHOT;
}

/* `members` is the offset of four counters in struct masqueraded: of TCP, UDP, ICMP and the others, by the flow. */
static void count_masqueraded(struct __sk_buff *skb, __u8 protocol, __u64 members)
{
    __u32 zero = 0;
    struct masqueraded *all = masqueraded.lookup(&zero);
    struct counter *counter;

    if (!all)
        return;
    counter = (void *)all + members;
    switch (protocol) {
    case IPPROTO_TCP:
        break;
    case IPPROTO_UDP:
        counter += 1;
        break;
    case IPPROTO_ICMP:
    case IPPROTO_ICMPV6:
        counter += 2;
        break;
    default:
        counter += 3;
    }
    counter->packets++;
    counter->bytes += skb->len;
}

static void count_allocation(__u32 retries)
{
    __u32 zero = 0;
    struct masqueraded *all = masqueraded.lookup(&zero);

    if (!all)
        return;
    all->allocations++;
    all->retries += retries;
}
