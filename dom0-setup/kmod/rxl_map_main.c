// SPDX-License-Identifier: GPL-2.0
/*
 * Maps frames of other Xen domains into parts of one large mapping, by several
 * threads of a process at a time.
 *
 * privcmd does the same with a mapping for each batch of frames, and holds the
 * lock of the whole address space while it asks Xen for all of them. Here the
 * process maps a window once, empty. Its page tables are made then and stay as
 * long as the window does, so that mapping and unmapping frames only writes
 * entries of them, by hypercalls that take many at a time. Who writes which is
 * settled by a range lock over the window's pages; the lock of the address
 * space is not taken at all.
 *
 * Three things keep a page table from going away under a hypercall:
 * - the window cannot be split, protected otherwise, or inherited;
 * - before the kernel touches the entries of a window that is unmapped, moved,
 *   or whose process ends, an MMU notifier closes the window: it says so in
 *   @open, and waits for all ranges that are locked. Then nobody works on the
 *   window any more, and nobody will. It also empties the window, unless the
 *   whole address space goes: the kernel would have a trap for each entry, and
 *   cannot move them at all;
 * - no call reaches for user memory while it holds a range, so whoever holds
 *   one never waits for a lock of the address space that the notifier's caller
 *   has.
 *
 * docs/kernel.md has the reasons at length. What user space says is rxl_map.h.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/compat.h>
#include <linux/fs.h>
#include <linux/ktime.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/module.h>
#include <linux/sched/signal.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include <xen/interface/xen.h>
#include <xen/xen.h>

#include <asm/xen/hypercall.h>
#include <asm/xen/page.h>

#include "range_lock.h"
#include "rxl_map.h"

/* Entries of one hypercall. Xen looks for other work after each of them. */
#define BATCH	512

/* Frames have as many bits as a page-table entry has for them. */
#define FRAME_BITS	40

/**
 * struct counters - what has been done on a window, for those who measure
 * @pages_mapped: entries that got a frame
 * @pages_unmapped: entries that were emptied
 * @hypercalls: how many it took
 * @locks: ranges that were locked
 * @waits: of these, the ones that had to wait
 * @wait_ns: how long, in sum
 */
struct counters {
	atomic64_t pages_mapped;
	atomic64_t pages_unmapped;
	atomic64_t hypercalls;
	atomic64_t locks;
	atomic64_t waits;
	atomic64_t wait_ns;
};

/**
 * struct batch - entries that are to be written
 * @updates: what is written where
 * @slots: which page of the caller's range each of them is
 * @count: how many
 */
struct batch {
	struct mmu_update updates[BATCH];
	unsigned int slots[BATCH];
	unsigned int count;
};

/**
 * struct window - an open file, and the one window that it can have
 * @lock: which pages of the window somebody works on
 * @notifier: tells of what happens to the window
 * @mm: the address space it is in; NULL: there has been none yet
 * @open: whether pages can be mapped; read under a locked range
 * @watched: whether @notifier is registered; under the lock of @mm
 * @start: its first address
 * @pages: how many it has
 * @tables: its page tables in order: the first entry of each
 * @last: for emptying it in the end, when nothing may be allocated
 * @restricted: the only domain whose frames may be mapped, or DOMID_INVALID
 * @counters: what has been done
 */
struct window {
	struct range_lock lock;
	struct mmu_interval_notifier notifier;
	struct mm_struct *mm;
	bool open;
	bool watched;
	unsigned long start;
	unsigned long pages;
	pte_t **tables;
	struct batch *last;
	unsigned int restricted;
	struct counters counters;
};

/* The entry of a page of the window. */
static pte_t *entry(const struct window *window, unsigned long page)
{
	unsigned long at = (window->start >> PAGE_SHIFT) % PTRS_PER_PTE + page;

	return window->tables[at / PTRS_PER_PTE] + at % PTRS_PER_PTE;
}

static void add(struct batch *batch, pte_t *entry, u64 value, unsigned int slot)
{
	struct mmu_update *update = &batch->updates[batch->count];

	update->ptr = virt_to_machine(entry).maddr | MMU_NORMAL_PT_UPDATE;
	update->val = value;
	batch->slots[batch->count++] = slot;
}

/*
 * Writes the entries of a batch, and empties it. Those that Xen refuses are
 * left as they were, with its reason in @errors. How many were written.
 */
static unsigned int write_entries(struct window *window, struct batch *batch,
				  unsigned int domain, s32 *errors)
{
	unsigned int at = 0, written = 0;

	while (at < batch->count) {
		int done = 0;
		int err;

		err = HYPERVISOR_mmu_update(batch->updates + at,
					    batch->count - at, &done, domain);
		atomic64_inc(&window->counters.hypercalls);
		written += done;
		at += done;
		if (!err)
			continue;
		if (at < batch->count)
			errors[batch->slots[at++]] = err;
	}
	batch->count = 0;
	return written;
}

/* Makes all processors forget what was mapped at pages of the window. */
static void flush(struct window *window)
{
	struct mmuext_op op = { .cmd = MMUEXT_TLB_FLUSH_ALL };

	WARN_ON_ONCE(HYPERVISOR_mmuext_op(&op, 1, NULL, DOMID_SELF));
	atomic64_inc(&window->counters.hypercalls);
}

/* The range is locked, and the window open. */
static int map_locked(struct window *window, const struct locked_range *range,
		      const struct rxl_map_frames *what, const u64 *frames,
		      s32 *errors, struct batch *batch)
{
	unsigned int flags = VM_READ | VM_SHARED;
	unsigned int slot, mapped = 0;
	unsigned long page;
	pgprot_t prot;

	for (page = range->first; page <= range->last; page++) {
		if (!pte_none(*entry(window, page)))
			return -EBUSY;
	}
	if (what->flags & RXL_MAP_WRITE)
		flags |= VM_WRITE;
	prot = vm_get_page_prot(flags);

	for (slot = 0; slot < what->count; slot++) {
		pte_t pte = pte_mkspecial(mfn_pte(frames[slot], prot));

		/* A frame that needs more bits than an entry has for it. */
		if (frames[slot] >> FRAME_BITS)
			errors[slot] = -EINVAL;
		else
			add(batch, entry(window, range->first + slot),
			    pte_val_ma(pte), slot);
		if (batch->count < BATCH && slot + 1 < what->count)
			continue;
		mapped += write_entries(window, batch, what->domain, errors);
		cond_resched();
		if (fatal_signal_pending(current))
			break;
	}
	/* Nothing was there before, so no processor remembers anything. */
	atomic64_add(mapped, &window->counters.pages_mapped);
	return slot < what->count ? -EINTR : 0;
}

/* Empties pages on which nobody else works. */
static int empty(struct window *window, unsigned long first, unsigned long last,
		 struct batch *batch)
{
	unsigned long unmapped = 0, asked = 0;
	unsigned long page;
	s32 refused[1];

	for (page = first; page <= last; page++) {
		pte_t *pte = entry(window, page);

		if (!pte_none(*pte)) {
			/* All reasons go to one place: there should be none. */
			add(batch, pte, 0, 0);
			asked++;
		}
		if (!batch->count || (batch->count < BATCH && page < last))
			continue;
		unmapped += write_entries(window, batch, DOMID_SELF, refused);
		cond_resched();
	}
	if (asked)
		flush(window);
	atomic64_add(unmapped, &window->counters.pages_unmapped);
	return WARN_ON_ONCE(unmapped != asked) ? -EIO : 0;
}

/* Locks pages of an open window of this process. */
static int begin_work(struct window *window, struct locked_range *range,
		      u64 first, u64 count)
{
	struct counters *counters = &window->counters;
	/* Set last when the window is made. */
	struct mm_struct *mm = smp_load_acquire(&window->mm);
	u64 begun;
	bool waited;
	int err;

	if (!mm)
		return -ENODEV;
	if (mm != current->mm)
		return -EPERM;
	if (!count || count > RXL_MAP_RANGE_PAGES_MAX ||
	    first >= window->pages || count > window->pages - first)
		return -EINVAL;

	range->first = first;
	range->last = first + count - 1;
	begun = ktime_get_ns();
	err = range_lock_killable(&window->lock, range, &waited);
	atomic64_inc(&counters->locks);
	if (waited) {
		atomic64_inc(&counters->waits);
		atomic64_add(ktime_get_ns() - begun, &counters->wait_ns);
	}
	if (err)
		return err;
	if (!READ_ONCE(window->open)) {
		range_unlock(&window->lock, range);
		return -ENODEV;
	}
	return 0;
}

static struct batch *new_batch(void)
{
	struct batch *batch = kvmalloc(sizeof(*batch), GFP_KERNEL_ACCOUNT);

	if (batch)
		batch->count = 0;
	return batch;
}

static bool any_paged_out(const s32 *errors, u64 count)
{
	while (count--) {
		if (errors[count] == -ENOENT)
			return true;
	}
	return false;
}

static long ioctl_map(struct window *window, void __user *arg)
{
	struct rxl_map_frames what;
	struct locked_range range;
	struct batch *batch = NULL;
	s32 *errors = NULL;
	u64 *frames;
	int err;

	if (copy_from_user(&what, arg, sizeof(what)))
		return -EFAULT;
	if (what.flags & ~RXL_MAP_WRITE)
		return -EINVAL;
	if (!what.count || what.count > RXL_MAP_RANGE_PAGES_MAX)
		return -EINVAL;
	/* Whose frames may be mapped is for Xen to say. */
	if (what.domain > U16_MAX)
		return -EINVAL;
	if (window->restricted != DOMID_INVALID &&
	    window->restricted != what.domain)
		return -EPERM;

	frames = vmemdup_user(u64_to_user_ptr(what.frames),
			      what.count * sizeof(*frames));
	if (IS_ERR(frames))
		return PTR_ERR(frames);
	errors = kvcalloc(what.count, sizeof(*errors), GFP_KERNEL_ACCOUNT);
	batch = new_batch();
	err = -ENOMEM;
	if (!errors || !batch)
		goto out;

	err = begin_work(window, &range, what.first, what.count);
	if (err)
		goto out;
	err = map_locked(window, &range, &what, frames, errors, batch);
	range_unlock(&window->lock, &range);
	if (err)
		goto out;

	if (copy_to_user(u64_to_user_ptr(what.errors), errors,
			 what.count * sizeof(*errors)))
		err = -EFAULT;
	else if (any_paged_out(errors, what.count))
		err = -ENOENT;
out:
	kvfree(batch);
	kvfree(errors);
	kvfree(frames);
	return err;
}

static long ioctl_unmap(struct window *window, void __user *arg)
{
	struct rxl_map_range what;
	struct locked_range range;
	struct batch *batch;
	int err;

	if (copy_from_user(&what, arg, sizeof(what)))
		return -EFAULT;
	batch = new_batch();
	if (!batch)
		return -ENOMEM;
	err = begin_work(window, &range, what.first, what.count);
	if (!err) {
		err = empty(window, range.first, range.last, batch);
		range_unlock(&window->lock, &range);
	}
	kvfree(batch);
	return err;
}

static long ioctl_restrict(struct window *window, void __user *arg)
{
	unsigned int was;
	u32 domain;

	if (get_user(domain, (u32 __user *)arg))
		return -EFAULT;
	if (domain >= DOMID_FIRST_RESERVED)
		return -EINVAL;
	was = cmpxchg(&window->restricted, DOMID_INVALID, domain);
	return was == DOMID_INVALID || was == domain ? 0 : -EINVAL;
}

static long rxl_map_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct window *window = file->private_data;
	void __user *at = (void __user *)arg;

	switch (cmd) {
	case RXL_MAP_MAP:
		return ioctl_map(window, at);
	case RXL_MAP_UNMAP:
		return ioctl_unmap(window, at);
	case RXL_MAP_RESTRICT:
		return ioctl_restrict(window, at);
	default:
		return -ENOTTY;
	}
}

/*
 * Nobody works on the window when this returns, nor ever will again. Only from
 * then on may its page tables go. Entries are left to the kernel if they go
 * with the whole address space: then they are not in use by any processor, and
 * Xen has let go of the tables (or is about to) without a call for each entry.
 */
static void close_window(struct window *window, bool with_address_space)
{
	struct locked_range all = { .first = 0, .last = ULONG_MAX };
	bool was_open;

	range_lock(&window->lock, &all);
	was_open = window->open;
	WRITE_ONCE(window->open, false);
	if (was_open && !with_address_space)
		empty(window, 0, window->pages - 1, window->last);
	range_unlock(&window->lock, &all);
}

static bool window_changes(struct mmu_interval_notifier *notifier,
			   const struct mmu_notifier_range *range,
			   unsigned long seq)
{
	struct window *window = container_of(notifier, struct window, notifier);

	/* Other events change no entry here: see the flags of the window. */
	if (range->event != MMU_NOTIFY_UNMAP &&
	    range->event != MMU_NOTIFY_RELEASE)
		return true;
	if (!mmu_notifier_range_blockable(range))
		return false;
	close_window(window, range->event == MMU_NOTIFY_RELEASE);
	return true;
}

static const struct mmu_interval_notifier_ops notifier_ops = {
	.invalidate = window_changes,
};

static void window_close(struct vm_area_struct *vma)
{
	struct window *window = vma->vm_private_data;

	/* The notifier has closed it, unless mmap() itself failed late. */
	close_window(window, true);
	if (window->watched) {
		window->watched = false;
		mmu_interval_notifier_remove(&window->notifier);
	}
}

static int window_may_split(struct vm_area_struct *vma, unsigned long addr)
{
	return -EINVAL;
}

static int window_mremap(struct vm_area_struct *vma)
{
	return -EINVAL;
}

static int window_mprotect(struct vm_area_struct *vma, unsigned long start,
			   unsigned long end, unsigned long flags)
{
	return -EACCES;
}

/* Nothing is mapped there, or only for reading. */
static vm_fault_t window_fault(struct vm_fault *vmf)
{
	return VM_FAULT_SIGBUS;
}

static const struct vm_operations_struct window_ops = {
	.close = window_close,
	.may_split = window_may_split,
	.mremap = window_mremap,
	.mprotect = window_mprotect,
	.fault = window_fault,
	.pfn_mkwrite = window_fault,
};

/**
 * struct table_walk - page tables that are being noted
 * @window: whose they are
 * @count: how many have been
 */
struct table_walk {
	struct window *window;
	unsigned long count;
};

static int note_table(pte_t *pte, unsigned long addr, void *data)
{
	struct table_walk *walk = data;
	unsigned long index = (addr >> PAGE_SHIFT) % PTRS_PER_PTE;

	if (!walk->count || !index)
		walk->window->tables[walk->count++] = pte - index;
	return 0;
}

static int rxl_map_mmap(struct file *file, struct vm_area_struct *vma)
{
	const unsigned long flags = VM_IO | VM_PFNMAP | VM_DONTEXPAND |
				    VM_DONTDUMP | VM_DONTCOPY;
	struct window *window = file->private_data;
	struct table_walk walk = { .window = window };
	unsigned long pages = vma_pages(vma);
	int err;

	/* A private mapping would copy what is written to it. */
	if (!(vma->vm_flags & VM_SHARED) || (vma->vm_flags & VM_EXEC) ||
	    vma->vm_pgoff || pages > RXL_MAP_WINDOW_PAGES_MAX)
		return -EINVAL;

#ifdef HAVE_VM_FLAGS_MOD
	vm_flags_mod(vma, flags, VM_MAYEXEC);
#else
	vma->vm_flags = (vma->vm_flags | flags) & ~VM_MAYEXEC;
#endif
	/* An inherited file may be mapped by two processes at once. */
	if (cmpxchg(&window->pages, 0, pages))
		return -EBUSY;
	window->start = vma->vm_start;
	window->tables = kvcalloc(pages / PTRS_PER_PTE + 2,
				  sizeof(*window->tables), GFP_KERNEL_ACCOUNT);
	window->last = new_batch();
	if (!window->tables || !window->last)
		return -ENOMEM;
	err = apply_to_page_range(vma->vm_mm, vma->vm_start,
				  pages << PAGE_SHIFT, note_table, &walk);
	if (err)
		return err;
	err = mmu_interval_notifier_insert_locked(&window->notifier,
						  vma->vm_mm, vma->vm_start,
						  pages << PAGE_SHIFT,
						  &notifier_ops);
	if (err)
		return err;
	window->watched = true;
	vma->vm_private_data = window;
	vma->vm_ops = &window_ops;
	WRITE_ONCE(window->open, true);
	/* Now it can be used: begin_work(). */
	smp_store_release(&window->mm, vma->vm_mm);
	return 0;
}

static int rxl_map_open(struct inode *inode, struct file *file)
{
	struct window *window;

	if (!xen_pv_domain()) {
		pr_info_once("only a PV domain can map frames by page-table entries; privcmd does it here\n");
		return -EOPNOTSUPP;
	}
	window = kzalloc(sizeof(*window), GFP_KERNEL_ACCOUNT);
	if (!window)
		return -ENOMEM;
	range_lock_init(&window->lock);
	window->restricted = DOMID_INVALID;
	file->private_data = window;
	return 0;
}

/* No mapping is left: each of them holds the file. */
static int rxl_map_release(struct inode *inode, struct file *file)
{
	struct window *window = file->private_data;

	kvfree(window->last);
	kvfree(window->tables);
	kfree(window);
	return 0;
}

static void rxl_map_show_fdinfo(struct seq_file *m, struct file *file)
{
	struct window *window = file->private_data;
	struct counters *counters = &window->counters;

	seq_printf(m, "window_pages:\t%lu\n", window->pages);
	seq_printf(m, "pages_mapped:\t%lld\n",
		   atomic64_read(&counters->pages_mapped));
	seq_printf(m, "pages_unmapped:\t%lld\n",
		   atomic64_read(&counters->pages_unmapped));
	seq_printf(m, "hypercalls:\t%lld\n",
		   atomic64_read(&counters->hypercalls));
	seq_printf(m, "locks:\t%lld\n", atomic64_read(&counters->locks));
	seq_printf(m, "waits:\t%lld\n", atomic64_read(&counters->waits));
	seq_printf(m, "wait_ns:\t%lld\n", atomic64_read(&counters->wait_ns));
}

static const struct file_operations rxl_map_fops = {
	.owner = THIS_MODULE,
	.open = rxl_map_open,
	.release = rxl_map_release,
	.mmap = rxl_map_mmap,
	.unlocked_ioctl = rxl_map_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.show_fdinfo = rxl_map_show_fdinfo,
};

static struct miscdevice rxl_map_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "rxl_map",
	.fops = &rxl_map_fops,
	.mode = 0600,
};

static int __init rxl_map_init(void)
{
	if (!xen_domain())
		return -ENODEV;
	return misc_register(&rxl_map_device);
}

static void __exit rxl_map_exit(void)
{
	misc_deregister(&rxl_map_device);
}

module_init(rxl_map_init);
module_exit(rxl_map_exit);

MODULE_DESCRIPTION("Maps frames of other Xen domains under a range lock");
MODULE_AUTHOR("The rxl maintainers");
MODULE_LICENSE("GPL");
MODULE_VERSION("0.1.0");
