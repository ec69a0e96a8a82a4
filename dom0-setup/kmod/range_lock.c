// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A lock on ranges of numbers; range_lock.h says what it promises.
 *
 * A range counts the ranges before it that overlap it. One that goes, whether
 * it was held or its owner gave up waiting, takes itself off the counts of
 * those after it. So there is one rule for leaving, nothing is searched again
 * when somebody wakes up, and a range that is granted needs no second look.
 *
 * The list is walked under a spinlock, and is as long as there are threads in
 * calls on one window: a tree would not pay.
 */
#include "range_lock.h"

static bool overlap(const struct locked_range *a, const struct locked_range *b)
{
	return a->first <= b->last && b->first <= a->last;
}

/* Takes the next place in the list. Whether the range is held at once. */
static bool enter(struct range_lock *lock, struct locked_range *range)
{
	struct locked_range *other;
	bool held;

	range->ahead = 0;
	init_completion(&range->granted);
	spin_lock(&lock->guard);
	list_for_each_entry(other, &lock->ranges, node) {
		if (overlap(other, range))
			range->ahead++;
	}
	list_add_tail(&range->node, &lock->ranges);
	held = !range->ahead;
	spin_unlock(&lock->guard);
	return held;
}

/**
 * range_lock_init() - makes a lock of which nothing is held
 * @lock: the lock
 */
void range_lock_init(struct range_lock *lock)
{
	spin_lock_init(&lock->guard);
	INIT_LIST_HEAD(&lock->ranges);
}

/**
 * range_lock() - waits for a range
 * @lock: the lock
 * @range: the range, of which @first and @last are set
 *
 * Return: whether it had to wait.
 */
bool range_lock(struct range_lock *lock, struct locked_range *range)
{
	if (enter(lock, range))
		return false;
	wait_for_completion(&range->granted);
	return true;
}

/**
 * range_lock_killable() - waits for a range, or until the caller is killed
 * @lock: the lock
 * @range: the range, of which @first and @last are set
 * @waited: set to whether it had to wait
 *
 * Return: 0 if the range is held, or -ERESTARTSYS, and then it is not.
 */
int range_lock_killable(struct range_lock *lock, struct locked_range *range,
			bool *waited)
{
	int err;

	*waited = !enter(lock, range);
	if (!*waited)
		return 0;
	err = wait_for_completion_killable(&range->granted);
	/* It may have been granted meanwhile: leaving is the same. */
	if (err)
		range_unlock(lock, range);
	return err;
}

/**
 * range_unlock() - gives a range back
 * @lock: the lock
 * @range: a range that is held
 */
void range_unlock(struct range_lock *lock, struct locked_range *range)
{
	struct locked_range *other = range;

	spin_lock(&lock->guard);
	list_for_each_entry_continue(other, &lock->ranges, node) {
		if (overlap(other, range) && !--other->ahead)
			complete(&other->granted);
	}
	list_del(&range->node);
	spin_unlock(&lock->guard);
}
