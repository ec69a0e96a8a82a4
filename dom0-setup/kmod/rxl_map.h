/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * What user space says to /dev/rxl_map.
 *
 * A process opens the device and maps it once, shared, from offset 0: that is
 * its window, which is empty. Then it maps foreign frames at pages of the
 * window, and unmaps them. Ranges that share no page are worked on at the same
 * time, by threads of the process that made the window; no other process can
 * use it. A child does not inherit it.
 *
 * Only a PV domain has such windows: opening fails with EOPNOTSUPP elsewhere.
 */
#ifndef RXL_MAP_H
#define RXL_MAP_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* Pages of the largest window: 64 GiB. */
#define RXL_MAP_WINDOW_PAGES_MAX	0x1000000UL
/* Pages of the largest range of one call: 256 MiB. */
#define RXL_MAP_RANGE_PAGES_MAX		0x10000UL

/* In rxl_map_frames.flags: the pages can be written, not only read. */
#define RXL_MAP_WRITE			1

/**
 * struct rxl_map_frames - frames that are to be mapped
 * @first: the page of the window where the first one goes
 * @count: how many, from 1 to RXL_MAP_RANGE_PAGES_MAX
 * @frames: address of @count frame numbers (__u64); of a domain that is
 *	    translated, they are its own (gfn), else the machine's (mfn)
 * @errors: address of @count results (__s32): 0, or a negative errno
 * @domain: whose frames they are
 * @flags: 0 or RXL_MAP_WRITE
 */
struct rxl_map_frames {
	__u64 first;
	__u64 count;
	__u64 frames;
	__u64 errors;
	__u32 domain;
	__u32 flags;
};

/**
 * struct rxl_map_range - pages of a window
 * @first: the first page
 * @count: how many, from 1 to RXL_MAP_RANGE_PAGES_MAX
 */
struct rxl_map_range {
	__u64 first;
	__u64 count;
};

/*
 * Maps frames. Fails with EBUSY, and has done nothing, if a page of the range
 * has a frame already. Else every frame has a result, and pages whose frame
 * cannot be mapped stay empty. Fails with ENOENT if any of the results is
 * -ENOENT: that frame is paged out; try it again.
 */
#define RXL_MAP_MAP		_IOW('R', 0x70, struct rxl_map_frames)
/* Empties pages. It does not matter which of them have a frame. */
#define RXL_MAP_UNMAP		_IOW('R', 0x71, struct rxl_map_range)
/*
 * From now on this open file maps frames of one domain only, given by its
 * number (__u32); EPERM for others. It cannot be taken back: EINVAL.
 */
#define RXL_MAP_RESTRICT	_IOW('R', 0x72, __u32)

#endif
