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
