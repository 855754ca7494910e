/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* What a program tells the next one about a packet. Nothing that a pod sets arrives: veth clears marks between
 * namespaces. */
#pragma once

/*
 * Set on what a program sends out by an uplink, or through the queue of a limited pod, and cleared there: whatever
 * reaches these places without it came through the stack. Within one device's transmission nobody else reads marks.
 */
#define FAST_MARK 0x706c0000

/*
 * Set on what a limited pod sends or gets by a host port, and cleared at the receiver's host end, which puts the source
 * in: on the way through the queue and the stack it is still the pod's, since the stack takes no packet under the
 * node's own.
 */
#define CALL_MARK   0x706c0001
#define ANSWER_MARK 0x706c0002
