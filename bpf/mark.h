/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* How a program tells the next one that a packet did not come through the host stack. */
#pragma once

/*
 * Set on what a program sends out by an uplink, or through the queue of a limited pod, and cleared there: whatever
 * reaches these places without it came through the stack. Within one device's transmission nobody else reads marks.
 */
#define FAST_MARK 0x706c0000
