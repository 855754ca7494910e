/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* What is said of an address by the longest prefix that holds it. */
#pragma once

#include "maps.h"

static struct lanes *find_lanes(const struct addr *address)
{
    struct prefix prefix = {.length = 128, .address = *address};

    return prefixes.lookup(&prefix);
}
