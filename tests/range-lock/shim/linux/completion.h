/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Linux' completions, for threads that a scheduler in Rust runs one at a time. */
#ifndef SHIM_LINUX_COMPLETION_H
#define SHIM_LINUX_COMPLETION_H

#include <stdbool.h>

struct completion {
	unsigned int done;
};

static inline void init_completion(struct completion *x)
{
	x->done = 0;
}

static inline void complete(struct completion *x)
{
	x->done++;
}

/*
 * The scheduler's: does not return before @done is not 0 or, if @killable, it
 * decides that the thread is killed, which it may do with @done set as well.
 * 0, or -ERESTARTSYS.
 */
int shim_wait(const unsigned int *done, bool killable);

static inline void wait_for_completion(struct completion *x)
{
	shim_wait(&x->done, false);
	x->done--;
}

static inline int wait_for_completion_killable(struct completion *x)
{
	int err = shim_wait(&x->done, true);

	if (x->done)
		x->done--;
	return err;
}

#endif
