/* SPDX-License-Identifier: GPL-2.0-or-later */
/* As much of Linux' lists as the range lock uses, for user space. */
#ifndef SHIM_LINUX_LIST_H
#define SHIM_LINUX_LIST_H

#include <stdbool.h>
#include <stddef.h>

struct list_head {
	struct list_head *next, *prev;
};

static inline void INIT_LIST_HEAD(struct list_head *list)
{
	list->next = list;
	list->prev = list;
}

static inline void list_add_tail(struct list_head *node, struct list_head *list)
{
	node->next = list;
	node->prev = list->prev;
	list->prev->next = node;
	list->prev = node;
}

static inline void list_del(struct list_head *node)
{
	node->next->prev = node->prev;
	node->prev->next = node->next;
	/* Whoever still has it stumbles. */
	node->next = NULL;
	node->prev = NULL;
}

#define shim_entry(at, as, member) \
	((__typeof__(as))((char *)(at) - offsetof(__typeof__(*(as)), member)))

#define shim_walk(pos, start, list, member)				\
	for (pos = shim_entry((start)->next, pos, member);		\
	     &pos->member != (list);					\
	     pos = shim_entry(pos->member.next, pos, member))

#define list_for_each_entry(pos, list, member) \
	shim_walk(pos, list, list, member)

#define list_for_each_entry_continue(pos, list, member) \
	shim_walk(pos, &pos->member, list, member)

#endif
