/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A lock on ranges of numbers, here of the pages of a window (see rxl_map.c).
 *
 * Ranges that share no number are held at the same time. Of those that overlap
 * one is held at a time, in the order in which they came: a small range that
 * comes later does not overtake a large one that waits, so none starves, and
 * one waits only for ranges that it overlaps. Whoever waits sleeps.
 *
 * Nothing here knows of pages, Xen or memory management. The file is also built
 * in user space, where all interleavings of small cases are run
 * (tests/range-lock).
 */
#ifndef RXL_RANGE_LOCK_H
#define RXL_RANGE_LOCK_H

#include <linux/completion.h>
#include <linux/list.h>
#include <linux/spinlock.h>

/**
 * struct range_lock - what is held and who waits
 * @guard: guards @ranges and all that is in it
 * @ranges: ranges that are held or waited for, in the order in which they came
 */
struct range_lock {
	spinlock_t guard; /* of the list */
	struct list_head ranges;
};

/**
 * struct locked_range - a range that somebody holds or waits for
 * @node: where it is in the lock's list
 * @first: its first number
 * @last: its last number, not smaller than @first
 * @ahead: how many ranges before it in the list overlap it; 0: it is held
 * @granted: done when @ahead gets 0
 *
 * It is on its owner's stack. From locking to unlocking only @first and @last
 * may be read outside range_lock.c, and nothing written.
 */
struct locked_range {
	struct list_head node;
	unsigned long first;
	unsigned long last;
	unsigned int ahead;
	struct completion granted;
};

void range_lock_init(struct range_lock *lock);
bool range_lock(struct range_lock *lock, struct locked_range *range);
int range_lock_killable(struct range_lock *lock, struct locked_range *range,
			bool *waited);
void range_unlock(struct range_lock *lock, struct locked_range *range);

#endif
