/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * What the kernel programs and hostagent/kernel/abi.py share: the layout of every map's key and value.
 *
 * Whoever changes a layout or the meaning of a field here changes HOPGATE_ABI too. There is no implicit padding: every
 * gap is a field, because map keys are compared byte by byte and because the Python mirror is checked against it.
 */
#ifndef HOPGATE_ABI_H
#define HOPGATE_ABI_H

#define HOPGATE_ABI 7

#define COMM_BYTES 16
#define PATH_BYTES 128
#define ARGV_BYTES 256
#define AGENT_BYTES 64

/* A chain longer than this is cut off: the process that goes on becomes unlabelled, and the unlabelled are denied. */
#define DEPTH_MAX 1024

/* Array map with one entry. */
struct hopgate_config {
	__u64 build;	/* digest of sources and map sizes */
	__u64 layout;	/* digest of this header and map sizes: equal layouts can share maps */
	__u64 netns;	/* cookie of the network namespace that has the listener */
	__u32 abi;	/* HOPGATE_ABI */
	__u32 mark;	/* SO_MARK of exempt sockets, never 0; what lets them pass is the map `passing` */
	__u64 intercept;	/* 0 when nobody is looked at; another number each time that it begins */
};

/* Namespaces by the inode numbers that /proc/PID/ns shows, 0 where one could not be read. */
struct hopgate_namespaces {
	__u32 pid;
	__u32 mnt;
	__u32 net;
	__u32 user;
};

/*
 * One process image: what a process ran between two execve calls. Kept while a process or a child image refers to it.
 * The map `nodes` is node id -> this, and `procs` is tgid -> node id, or 0 for a process without label.
 */
struct hopgate_node {
	__u64 parent;		/* node id, 0 at a root */
	__u64 start_ns;		/* CLOCK_MONOTONIC */
	__u64 inode;		/* of the executable that is mapped */
	__u64 cgroup_id;	/* at exec; inode of the directory in cgroup2 */
	__u32 device;		/* of the executable, the kernel's own encoding (major << 20 | minor) */
	__u32 tgid;		/* in the initial pid namespace */
	__u32 uid;		/* real uid at exec, in the initial user namespace */
	__s32 others;		/* references beyond the first: the node goes when this falls below 0 */
	__u32 depth;		/* ancestors above this one */
	__u32 argv_length;	/* bytes of the whole argument vector, every argument with its NUL */
	__u32 argv_stored;	/* bytes of it in argv[] */
	__u32 path_length;	/* with its NUL; 0 when it could not be read */
	struct hopgate_namespaces namespaces;	/* at exec */
	char comm[COMM_BYTES];
	char path[PATH_BYTES];	/* as passed to execve: for people, it grants nothing */
	char argv[ARGV_BYTES];
};

/*
 * The agent that a process image was declared to be, by node id. Written once, by the host agent; it goes with the node.
 */
struct hopgate_declaration {
	char agent[AGENT_BYTES];	/* ends with a NUL */
};

#define FAMILY_4 4
#define FAMILY_6 6

/*
 * IPv4 addresses fill the first four bytes; v4-mapped IPv6 is IPv4. Addresses in network order, ports in host order.
 * `local` is 1 for sockets of the listener's own network namespace, which so never collide with those of any other.
 */
struct hopgate_connect_key {
	__u8 source[16];
	__u8 dest[16];
	__u16 source_port;
	__u16 dest_port;
	__u16 family;
	__u16 local;
};

#define CONNECT_ESTABLISHED 1u	/* the handshake was completed by the socket that the record is about */
#define CONNECT_AMBIGUOUS 2u	/* two network namespaces wrote a record under this key */
#define CONNECT_CLOSED 4u	/* the socket was closed since */

struct hopgate_connect_record {
	__u64 node;
	__u64 netns;	/* cookie of the network namespace */
	__u64 socket;	/* cookie of the socket */
	__u64 time_ns;	/* CLOCK_MONOTONIC, of the connect, and of the close once CONNECT_CLOSED is set */
	__u32 tgid;
	__u32 flags;
};

/*
 * A member of the scope, in a trie of prefixes: the family, the port, and as much of an address (as in connect_key) as
 * the prefix says. A protected port has family 0 and no address. Family and port always count as a whole, so that the
 * order of their bytes does not matter.
 */
struct hopgate_scope_key {
	__u32 prefix;	/* bits that count: SCOPE_PORT_BITS, and those of the address */
	__u16 family;
	__u16 port;
	__u8 address[16];
};

#define SCOPE_PORT_BITS 32

/* What the task iterator tells about one process. */
struct hopgate_task_row {
	__u64 node;	/* its label, 0 without */
	__u64 exec_id;	/* grows with every execve */
	__u64 start_ns;
	__u64 inode;
	__u64 cgroup_id;
	__u32 device;
	__u32 uid;
	__u32 tgid;
	__u32 parent_tgid;
	__u32 ns_tgid;		/* as the reader of /proc sees it */
	__u32 parent_ns_tgid;	/* 0 outside the reader's pid namespace */
	__u32 known;		/* 1 when it has an entry in procs, with or without a label */
	__u32 parent_kthread;	/* 1 when its parent is a kernel thread */
	struct hopgate_namespaces namespaces;
	char comm[COMM_BYTES];
};

/* A file that makes processes agents that are intercepted, as the nodes have it. */
struct hopgate_file_key {
	__u64 inode;
	__u32 device;
	__u32 unused;
};

#define PROTOCOL_POSTGRESQL 1
#define PROTOCOL_MYSQL 2
#define PROTOCOL_TDS 3
#define PROTOCOL_MONGODB 4
#define PROTOCOL_REDIS 5
#define PROTOCOL_ORACLE 6

#define STREAM_HEAD 16

/* How one side of a connection begins. */
struct hopgate_stream {
	__u32 first;	/* sequence number of the first byte, once it is known */
	__u8 begun;	/* 1 when it is */
	__u8 have;	/* bytes in head[] */
	__u8 done;	/* 1 when nothing that is looked for begins like this */
	__u8 unused;
	__u8 head[STREAM_HEAD];
};

/* The walk through a client's first TLS record, as far as the bytes have come. Offsets are in the stream. */
struct hopgate_hello {
	__u64 number;	/* the bytes that were read for what comes next */
	__u32 at;	/* the next byte that is of interest */
	__u32 next;	/* the first that has not come yet */
	__u32 left;	/* bytes of the list of protocols */
	__u8 stage;	/* 0 before it begins */
	__u8 need;	/* bytes that are missing of the number */
	__u16 unused;
};

/* A connection that is looked at: the storage of its socket. */
struct hopgate_watch {
	struct hopgate_connect_key key;
	__u64 epoch;	/* config's `intercept` at connect */
	__u64 node;
	__u64 netns;
	__u64 socket;
	__u32 tgid;
	__u32 found;	/* PROTOCOL_… */
	struct hopgate_stream sent;
	struct hopgate_stream received;
	struct hopgate_hello hello;
};

#define EVENT_HIDDEN 1		/* a protocol is spoken to what is no target; `detail` is PROTOCOL_… */
#define EVENT_UNWATCHED 2	/* a connection that should be looked at cannot be: it is closed for data */
#define EVENT_SENT_RAW 3	/* somebody writes below TCP; `detail` is SENT_… */

#define SENT_RAW_IP 0		/* a raw IP socket was made */
#define SENT_FRAME 1		/* a packet socket sent a frame that is to nothing in scope */
#define SENT_FRAME_IN_SCOPE 2	/* a packet socket sent a frame to what is in scope */

/*
 * What the host agent has to know of at once: an entry of the ring buffer `events`. What has no value is 0. Addresses and
 * ports are as in connect_key. Nothing is let through because an event was lost.
 */
struct hopgate_event {
	__u64 time_ns;	/* CLOCK_MONOTONIC */
	__u64 node;	/* image of the process that it is about */
	__u64 netns;	/* cookie of the network namespace */
	__u64 socket;	/* cookie of the socket */
	__u8 source[16];
	__u8 dest[16];
	__u16 source_port;
	__u16 dest_port;
	__u16 family;
	__u16 detail;	/* what the type says that it is */
	__u32 type;	/* EVENT_… */
	__u32 tgid;
};

/* Indices of the array map `counters`. Those up to OVERFLOW_LAST say that a process or a connection lost its label. */
#define OVERFLOW_PROCS 0
#define OVERFLOW_NODES 1
#define OVERFLOW_CONNECTS 2
#define OVERFLOW_LAST 2
#define COUNT_TOO_DEEP 3	/* processes unlabelled at DEPTH_MAX */
#define COUNT_UNLABELLED 4	/* connects in scope by a process without label */
#define COUNT_AMBIGUOUS 5	/* records under one key from two network namespaces */
#define COUNT_FORGED 6		/* marks taken off sockets that are not exempt */
#define COUNT_GRAVEYARD_FULL 7	/* dead nodes released at once because they could not wait */
#define COUNT_CONNECTS 8	/* records written */
#define COUNT_GRAVEYARD_CUT 9	/* dead nodes released early because the table of nodes was full */
#define COUNT_EVENTS_LOST 10	/* events for which the ring had no room */
#define COUNT_RAW_UNTOLD 11	/* sockets below TCP that were not told of, because there were too many */
#define COUNT_HIDDEN 12		/* connections closed for data because of what they begin with */
#define COUNT_UNWATCHED 13	/* … because they cannot be looked at */
#define COUNT_UNCLOSED 14	/* … and those of them that could not be closed either */
#define COUNT_USERS_FULL 15	/* connects in users' network namespaces for which there was no room */
#define COUNTERS 16

#endif
