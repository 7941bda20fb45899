// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/*
 * Keeps the lineage: which image each process runs, and from which image it came.
 *
 *   fork   the child gets the node of the process that called clone (`current`, so CLONE_PARENT changes nothing)
 *   exec   a child node is made, and the process moves to it
 *   exit   when the whole thread group is dead, the node goes to the graveyard
 *
 * A process without label ("unlabelled": older than these programs and not seeded, or an insert failed) stays without
 * one, and so do its children; it is never given a guess. Failed inserts are counted.
 *
 * Dead nodes wait in a FIFO, so that the listener can still read the image of a client that connected and exited at
 * once. The queue holds one reference for each entry; when it is full, or when there is no room for a new node, the
 * oldest gives way.
 *
 * Reference counting needs no fetch-and-add, which this compiler's instruction set lacks: several decrements may all
 * read a count below zero, but only one of them deletes the node, and only that one goes on to the parent.
 *
 * Blind spots: the path is what the caller passed to execve; uid, cgroup and namespaces are those at exec, so what
 * setuid(), unshare() and setns() change afterwards is seen in the images that are executed then.
 */

/*
 * BCC makes these the old bpf_probe_read, which sock_ops may not call, where it finds no address of theirs in
 * /proc/kallsyms: without CAP_SYSLOG, or with kernel.kptr_restrict=2, there are none.
 */
#undef bpf_probe_read_kernel
#undef bpf_probe_read_kernel_str
#undef bpf_probe_read_user

BPF_TABLE_PINNED("array", u32, struct hopgate_config, settings, 1, PINS "/settings");
BPF_TABLE_PINNED("array", u32, u64, counters, COUNTERS, PINS "/counters");
BPF_TABLE_PINNED("array", u32, struct hopgate_node, blank, 1, PINS "/blank");
BPF_TABLE_PINNED("hash", u32, u64, procs, PROCS_MAX, PINS "/procs");
BPF_TABLE_PINNED("hash", u64, struct hopgate_node, nodes, NODES_MAX, PINS "/nodes");
BPF_TABLE_PINNED("hash", u64, struct hopgate_declaration, declared, DECLARED_MAX, PINS "/declared");
BPF_TABLE_PINNED("hash", u64, u32, spared, SPARED_MAX, PINS "/spared", BPF_F_NO_PREALLOC);
BPF_QUEUESTACK_PINNED("queue", graveyard, u64, GRAVEYARD_MAX, 0, PINS "/graveyard");

/* BCC has no macro for a ring that is pinned. */
struct events_table_t {
	int key;
	u32 leaf;
	int (*ringbuf_output)(void *, u64, u64);
	u32 max_entries;
};
__attribute__((section("maps/ringbuf:" PINS "/events"))) struct events_table_t events = {.max_entries = EVENTS_BYTES};

/* Levels that one event releases; what is left of a longer chain goes through the graveyard. */
#define RELEASE_MAX 16
/* Dead nodes that are released early for one that finds no room. */
#define ROOM_MAX 4

#define PF_KTHREAD 0x00200000

/*
 * The address of a field of a kernel structure, and its value; zero when it cannot be read.
 *
 * BCC optimises with the host's data layout and emits code with BPF's. Where a large structure has members that the two
 * align differently, an address that the optimiser knows to be inside it comes out wrong by some bytes (`mm->exe_file`
 * by 16). So the offset is a number, and the optimiser may not know what it is added to.
 */
#define KADDRESS(type, pointer, field)                                                                                 \
	({                                                                                                             \
		u64 _address = (u64)(pointer);                                                                         \
		asm volatile("" : "+r"(_address));                                                                     \
		(void *)(_address + __builtin_offsetof(struct type, field));                                           \
	})

#define KREAD(type, pointer, field)                                                                                    \
	({                                                                                                             \
		typeof(((struct type *)0)->field) _value;                                                              \
		bpf_probe_read_kernel(&_value, sizeof(_value), KADDRESS(type, pointer, field));                        \
		_value;                                                                                                \
	})

static inline void count(u32 which)
{
	u64 *counter = counters.lookup(&which);

	if (counter)
		__sync_fetch_and_add(counter, 1);
}

/* Tells the host agent. Whatever the event is about has to be denied already: it may be lost. */
static inline void emit(struct hopgate_event *event)
{
	event->time_ns = bpf_ktime_get_ns();
	if (events.ringbuf_output(event, sizeof(*event), 0))
		count(COUNT_EVENTS_LOST);
}

/* Drops one reference on each node upwards until one survives. */
static inline void release(u64 id)
{
	for (int level = 0; level < RELEASE_MAX; level++) {
		struct hopgate_node *node = nodes.lookup(&id);

		if (!node)
			return;
		u64 parent = node->parent;

		__sync_fetch_and_add(&node->others, -1);
		if (*(volatile s32 *)&node->others >= 0)
			return;
		if (nodes.delete(&id))
			return;
		declared.delete(&id);
		spared.delete(&id);
		id = parent;
		if (!id)
			return;
	}
	if (graveyard.push(&id, 0))
		count(COUNT_GRAVEYARD_FULL);
}

static inline void bury(u64 id)
{
	u64 oldest = 0;

	if (!graveyard.push(&id, 0))
		return;
	if (!graveyard.pop(&oldest)) {
		release(oldest);
		if (!graveyard.push(&id, 0))
			return;
	}
	count(COUNT_GRAVEYARD_FULL);
	release(id);
}

/* The dead give way to the living when the table is full. */
static inline void make_room(void)
{
	for (int entry = 0; entry < ROOM_MAX; entry++) {
		u64 oldest = 0;

		if (graveyard.pop(&oldest))
			return;
		count(COUNT_GRAVEYARD_CUT);
		release(oldest);
	}
}

/* The number of a process in the pid namespace at `level`; 0 when it is not visible there. */
static inline struct upid read_upid(struct pid *pid, u32 level)
{
	struct upid upid = {};

	/* numbers[] is as long as the nesting of pid namespaces, which the kernel bounds to 32 */
	if (level <= 32 && level <= KREAD(pid, pid, level))
		bpf_probe_read_kernel(&upid, sizeof(upid), KADDRESS(pid, pid, numbers) + level * sizeof(upid));
	return upid;
}

static inline struct pid *read_tgid(struct task_struct *task)
{
	struct signal_struct *signal = KREAD(task_struct, task, signal);

	return KREAD(signal_struct, signal, pids[PIDTYPE_TGID]);
}

/* raw_tp sched_process_fork(struct task_struct *parent, struct task_struct *child) */
int on_fork(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *child = (struct task_struct *)ctx->args[1];
	u32 tgid = bpf_get_current_pid_tgid() >> 32;
	u32 child_tgid = KREAD(task_struct, child, tgid);

	if (tgid == child_tgid)
		return 0;

	u64 *own = procs.lookup(&tgid);
	u64 *old = procs.lookup(&child_tgid);
	u64 id = own ? *own : 0;

	/* during an upgrade the old and the new program both see the event */
	if (old && id && *old == id)
		return 0;

	struct hopgate_node *node = id ? nodes.lookup(&id) : 0;

	if (!node) {
		/* a leftover under a recycled tgid must not label this process */
		if (old)
			*old = 0;
		return 0;
	}
	__sync_fetch_and_add(&node->others, 1);
	if (procs.update(&child_tgid, &id)) {
		__sync_fetch_and_add(&node->others, -1);
		count(OVERFLOW_PROCS);
		if (old)
			*old = 0;
	}
	return 0;
}

/* As /proc/PID/ns shows them. The pid namespace is the one that the task is in, not that of its children to come. */
static inline void read_namespaces(struct hopgate_namespaces *read, struct task_struct *task)
{
	struct pid *pid = read_tgid(task);
	struct pid_namespace *pid_ns = read_upid(pid, KREAD(pid, pid, level)).ns;
	struct nsproxy *proxy = KREAD(task_struct, task, nsproxy);
	struct mnt_namespace *mnt_ns = KREAD(nsproxy, proxy, mnt_ns);
	struct net *net_ns = KREAD(nsproxy, proxy, net_ns);
	const struct cred *cred = KREAD(task_struct, task, cred);
	struct user_namespace *user_ns = KREAD(cred, cred, user_ns);

	read->pid = KREAD(pid_namespace, pid_ns, ns.inum);
	read->mnt = KREAD(mnt_namespace, mnt_ns, ns.inum);
	read->net = KREAD(net, net_ns, ns.inum);
	read->user = KREAD(user_namespace, user_ns, ns.inum);
}

static inline void read_image(struct hopgate_node *node, struct linux_binprm *bprm)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct mm_struct *mm = KREAD(task_struct, task, mm);
	struct file *file = KREAD(linux_binprm, bprm, file);
	struct inode *inode = KREAD(file, file, f_inode);
	struct super_block *sb = KREAD(inode, inode, i_sb);
	const char *path = KREAD(linux_binprm, bprm, filename);
	u64 start = KREAD(mm_struct, mm, arg_start);
	u64 end = KREAD(mm_struct, mm, arg_end);
	u64 length = end > start ? end - start : 0;
	u32 stored = length < ARGV_BYTES ? length : ARGV_BYTES;
	int copied;

	node->start_ns = bpf_ktime_get_ns();
	node->inode = KREAD(inode, inode, i_ino);
	node->device = KREAD(super_block, sb, s_dev);
	node->cgroup_id = bpf_get_current_cgroup_id();
	node->tgid = bpf_get_current_pid_tgid() >> 32;
	node->uid = bpf_get_current_uid_gid();
	node->argv_length = length;
	read_namespaces(&node->namespaces, task);
	bpf_get_current_comm(node->comm, sizeof(node->comm));
	copied = bpf_probe_read_kernel_str(node->path, sizeof(node->path), path);
	node->path_length = copied > 0 ? copied : 0;
	if (stored && !bpf_probe_read_user(node->argv, stored, (void *)start))
		node->argv_stored = stored;
}

/* Makes the child node of `parent` for the image that current has just started to run; 0 when that failed. */
static inline u64 make_node(u64 parent, struct linux_binprm *bprm)
{
	u32 zero = 0;
	u64 id = bpf_ktime_get_ns() << 8 | (bpf_get_smp_processor_id() & 0xff);
	struct hopgate_node *above = nodes.lookup(&parent);
	struct hopgate_node *template = blank.lookup(&zero);

	if (!above || !template)
		return 0;
	if (above->depth + 1 >= DEPTH_MAX) {
		count(COUNT_TOO_DEEP);
		return 0;
	}
	/* too large for the stack: a blank one is inserted, and filled in before anybody can know its id */
	if (nodes.insert(&id, template)) {
		make_room();
		if (nodes.insert(&id, template)) {
			count(OVERFLOW_NODES);
			return 0;
		}
	}
	struct hopgate_node *node = nodes.lookup(&id);

	if (!node)
		return 0;
	node->depth = above->depth + 1;
	read_image(node, bprm);
	node->parent = parent;
	return id;
}

/* raw_tp sched_process_exec(struct task_struct *task, pid_t old_pid, struct linux_binprm *bprm) */
int on_exec(struct bpf_raw_tracepoint_args *ctx)
{
	u32 tgid = bpf_get_current_pid_tgid() >> 32;
	u64 *own = procs.lookup(&tgid);

	if (!own || !*own)
		return 0;

	u64 old = *own;
	u64 made = make_node(old, (struct linux_binprm *)ctx->args[2]);

	/* the reference that the process had on the old node becomes that of the new node as its child */
	*own = made;
	if (!made)
		bury(old);
	return 0;
}

/* raw_tp sched_process_exit(struct task_struct *task, …) */
int on_exit(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = (struct task_struct *)ctx->args[0];
	struct signal_struct *signal = KREAD(task_struct, task, signal);
	u32 tgid = bpf_get_current_pid_tgid() >> 32;

	if (KREAD(signal_struct, signal, live.counter))
		return 0;

	u64 *own = procs.lookup(&tgid);

	if (!own)
		return 0;

	u64 id = *own;

	/* two threads that die at the same time both get here; one of them deletes */
	if (procs.delete(&tgid))
		return 0;
	if (id)
		bury(id);
	return 0;
}

/* iter/task: one row for each process that the reader's /proc shows, without kernel threads. */
int bpf_iter__task(struct bpf_iter__task *ctx)
{
	struct seq_file *seq = ctx->meta->seq;
	struct task_struct *task = ctx->task;
	struct hopgate_task_row row = {};

	if (!task)
		return 0;
	struct mm_struct *mm = KREAD(task_struct, task, mm);

	if (!mm || KREAD(task_struct, task, pid) != KREAD(task_struct, task, tgid))
		return 0;
	row.tgid = KREAD(task_struct, task, tgid);

	u64 *own = procs.lookup(&row.tgid);

	if (own) {
		row.known = 1;
		row.node = *own;
	}

	struct task_struct *parent = KREAD(task_struct, task, real_parent);
	struct file *file = KREAD(mm_struct, mm, exe_file);
	struct inode *inode = KREAD(file, file, f_inode);
	struct super_block *sb = KREAD(inode, inode, i_sb);
	const struct cred *cred = KREAD(task_struct, task, cred);
	struct css_set *css = KREAD(task_struct, task, cgroups);
	struct cgroup *cgroup = KREAD(css_set, css, dfl_cgrp);
	struct kernfs_node *directory = KREAD(cgroup, cgroup, kn);
	u32 level = KREAD(pid, read_tgid((struct task_struct *)bpf_get_current_task()), level);

	row.ns_tgid = read_upid(read_tgid(task), level).nr;
	row.parent_tgid = KREAD(task_struct, parent, tgid);
	row.parent_ns_tgid = read_upid(read_tgid(parent), level).nr;
	row.parent_kthread = !!(KREAD(task_struct, parent, flags) & PF_KTHREAD);
	row.exec_id = KREAD(task_struct, task, self_exec_id);
	row.start_ns = KREAD(task_struct, task, start_time);
	row.inode = KREAD(inode, inode, i_ino);
	row.device = KREAD(super_block, sb, s_dev);
	row.uid = KREAD(cred, cred, uid.val);
	row.cgroup_id = KREAD(kernfs_node, directory, id);
	read_namespaces(&row.namespaces, task);
	bpf_probe_read_kernel(row.comm, sizeof(row.comm), KADDRESS(task_struct, task, comm));
	bpf_seq_write(seq, &row, sizeof(row));
	return 0;
}
