// SPDX-License-Identifier: GPL-2.0-or-later
/* So that Rust needs to know no layout: what a test's thread does with a lock. */
#include <stdlib.h>

#include "range_lock.h"

struct range_lock *glue_new(void)
{
	struct range_lock *lock = malloc(sizeof(*lock));

	if (lock)
		range_lock_init(lock);
	return lock;
}

/* Whether nothing is left in the list. */
int glue_free(struct range_lock *lock)
{
	int empty = lock->ranges.next == &lock->ranges && !lock->guard.held;

	free(lock);
	return empty;
}

/* Locks and unlocks a range, with the range on this thread's stack. */
int glue_hold(struct range_lock *lock, unsigned long first, unsigned long last,
	      int killable, int *waited)
{
	struct locked_range range = { .first = first, .last = last };
	bool slept = false;
	int err = 0;

	if (killable)
		err = range_lock_killable(lock, &range, &slept);
	else
		slept = range_lock(lock, &range);
	if (!err)
		range_unlock(lock, &range);
	*waited = slept;
	return err;
}
