/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Linux' spinlocks, for threads that a scheduler in Rust runs one at a time. */
#ifndef SHIM_LINUX_SPINLOCK_H
#define SHIM_LINUX_SPINLOCK_H

typedef struct {
	int held;
} spinlock_t;

static inline void spin_lock_init(spinlock_t *lock)
{
	lock->held = 0;
}

/* The scheduler's: another thread may run before the lock is taken. */
void shim_spin_lock(spinlock_t *lock);
void shim_spin_unlock(spinlock_t *lock);

#define spin_lock shim_spin_lock
#define spin_unlock shim_spin_unlock

#endif
