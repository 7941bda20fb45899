// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/*
 * Writes down who connects. sock_ops, attached to a cgroup:
 *
 *   TCP_CONNECT         the source port is chosen and the SYN not yet sent: the record is written
 *   ACTIVE_ESTABLISHED  the handshake's ACK is not yet sent, so the listener cannot have accepted: the record is marked
 *                       established
 *   STATE (to CLOSE)    a record that was never established goes; an established one is marked closed and stays,
 *                       because the client may be gone before the listener accepts
 *
 * Only the first runs in the process that connects; the others find the record by the socket's addresses, and believe
 * it only if it carries the socket's own cookie.
 *
 * Sockets of exempt images (the proxy's own) get a mark, which is taken off any other, and their cookie is kept while they
 * connect. The netfilter rules ask on_exempt about each SYN that has the mark: marks are for everybody who may set them,
 * also between this program and a repeated SYN, and on sockets that are not TCP's.
 *
 * Only the stack is used for scratch: per-CPU maps are corrupted when this program is preempted.
 *
 * Blind spot: a process outside the cgroup and a SYN from a raw socket are not seen: they have no record, hence no
 * access.
 */

/*
 * Records are apart by whose the network namespace is, so that nobody can fill the table of somebody else by connecting
 * to himself: the listener's own; those that root made, as containers have; those that users made. What does not fit is
 * denied.
 */
BPF_TABLE_PINNED("hash", struct hopgate_connect_key, struct hopgate_connect_record, connects, CONNECTS_MAX,
		 PINS "/connects");
BPF_TABLE_PINNED("hash", struct hopgate_connect_key, struct hopgate_connect_record, connects_behind, CONNECTS_MAX / 2,
		 PINS "/connects_behind");
BPF_TABLE_PINNED("hash", struct hopgate_connect_key, struct hopgate_connect_record, connects_of_users,
		 CONNECTS_MAX / 8, PINS "/connects_of_users");
BPF_TABLE_PINNED("lpm_trie", struct hopgate_scope_key, u32, scope, SCOPE_MAX, PINS "/scope", BPF_F_NO_PREALLOC);
BPF_TABLE_PINNED("hash", u64, u32, exempt, EXEMPT_MAX, PINS "/exempt");
BPF_TABLE_PINNED("hash", u64, u32, passing, PASSING_MAX, PINS "/passing", BPF_F_NO_PREALLOC);

#define AF_INET 2
#define AF_INET6 10
#define SOL_SOCKET 1
#define SO_MARK 36
#define EEXIST 17

/* The verifier takes loads of 4 bytes only from these arrays, and the compiler would merge two into one of 8. */
static inline void read_ip6(volatile u32 *from, u32 *into)
{
	into[0] = from[0];
	into[1] = from[1];
	into[2] = from[2];
	into[3] = from[3];
}

/* Addresses and ports as the socket was asked to connect; false when this is no TCP over IP. */
static inline bool read_key(struct bpf_sock_ops *ops, struct hopgate_connect_key *key)
{
	u32 *source = (u32 *)key->source;
	u32 *dest = (u32 *)key->dest;

	key->source_port = ops->local_port;
	key->dest_port = bpf_ntohl(ops->remote_port);
	if (ops->family == AF_INET) {
		key->family = FAMILY_4;
		source[0] = ops->local_ip4;
		dest[0] = ops->remote_ip4;
		return true;
	}
	if (ops->family != AF_INET6)
		return false;
	read_ip6(ops->remote_ip6, dest);
	if (!dest[0] && !dest[1] && dest[2] == bpf_htonl(0xffff)) {
		key->family = FAMILY_4;
		source[0] = ops->local_ip4;
		dest[0] = dest[3];
		dest[2] = 0;
		dest[3] = 0;
		return true;
	}
	key->family = FAMILY_6;
	read_ip6(ops->local_ip6, source);
	return true;
}

static inline bool in_scope(struct hopgate_connect_key *key)
{
	struct hopgate_scope_key member = {.prefix = SCOPE_PORT_BITS, .port = key->dest_port};

	if (scope.lookup(&member))
		return true;
	/* the longest question: a trie answers with whatever prefix of it is a member */
	member.prefix = 8 * (sizeof(member) - sizeof(member.prefix));
	member.family = key->family;
	__builtin_memcpy(member.address, key->dest, sizeof(member.address));
	return scope.lookup(&member);
}

static inline void set_mark(struct bpf_sock_ops *ops, u32 mark)
{
	bpf_setsockopt(ops, SOL_SOCKET, SO_MARK, &mark, sizeof(mark));
}

/* The rules let the socket's SYN pass until it is answered. */
static inline void let_pass(struct bpf_sock_ops *ops, u32 mark)
{
	u64 cookie = bpf_get_socket_cookie(ops);
	u32 one = 1;

	set_mark(ops, mark);
	passing.update(&cookie, &one);
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

/* It was answered, or is gone. */
static inline void has_passed(struct bpf_sock_ops *ops, u32 mark)
{
	struct bpf_sock *sk = ops->sk;
	u64 cookie = bpf_get_socket_cookie(ops);

	if (sk && sk->mark == mark)
		passing.delete(&cookie);
}

/*
 * Whether the network namespace was made by a user, that is in a user namespace of its own. Only that of the caller can
 * be looked at; a socket of another one counts as a user's.
 */
static inline bool made_by_user(struct task_struct *task, u64 netns)
{
	struct nsproxy *nsproxy = KREAD(task_struct, task, nsproxy);
	struct net *net = KREAD(nsproxy, nsproxy, net_ns);
	struct user_namespace *owner = KREAD(net, net, user_ns);

	return KREAD(net, net, net_cookie) != netns || KREAD(user_namespace, owner, level);
}

/* The record of this very socket. */
static inline struct hopgate_connect_record *find_record(struct hopgate_connect_key *key, u64 socket)
{
	struct hopgate_connect_record *record;

	if (key->local) {
		record = connects.lookup(key);
		return record && record->socket == socket ? record : 0;
	}
	record = connects_behind.lookup(key);
	if (record && record->socket == socket)
		return record;
	record = connects_of_users.lookup(key);
	return record && record->socket == socket ? record : 0;
}

static inline void on_connect(struct bpf_sock_ops *ops, struct hopgate_connect_key *key, struct hopgate_config *config)
{
	bool recorded = in_scope(key);

	if (!recorded && !config->intercept)
		return;

	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	u64 netns = bpf_get_netns_cookie(ops);
	struct hopgate_connect_record record = {.netns = netns};

	key->local = netns == config->netns;

	record.tgid = KREAD(task_struct, task, tgid);

	u64 *own = procs.lookup(&record.tgid);

	record.node = own ? *own : 0;
	if (record.node && exempt.lookup(&record.node)) {
		if (recorded)
			let_pass(ops, config->mark);
		return;
	}
	if (config->intercept) {
		/* the socket may have been elsewhere before */
		unwatch(ops);
		if (!recorded)
			watch(ops, key, config, netns, record.node, record.tgid);
	}
	if (!recorded)
		return;
	struct bpf_sock *sk = ops->sk;

	if (!sk || sk->mark == config->mark) {
		set_mark(ops, 0);
		count(COUNT_FORGED);
	}
	if (!record.node)
		count(COUNT_UNLABELLED);

	record.socket = bpf_get_socket_cookie(ops);
	record.time_ns = bpf_ktime_get_ns();

	bool users = !key->local && made_by_user(task, netns);
	int failed = users	? connects_of_users.insert(key, &record) :
		     key->local ? connects.insert(key, &record) :
				  connects_behind.insert(key, &record);

	if (failed == -EEXIST) {
		struct hopgate_connect_record *old = users	? connects_of_users.lookup(key) :
						     key->local ? connects.lookup(key) :
								  connects_behind.lookup(key);

		if (old && old->netns != record.netns && !(old->flags & CONNECT_CLOSED)) {
			record.flags |= CONNECT_AMBIGUOUS;
			count(COUNT_AMBIGUOUS);
		}
		failed = users	    ? connects_of_users.update(key, &record) :
			 key->local ? connects.update(key, &record) :
				      connects_behind.update(key, &record);
	}
	if (failed) {
		/* what is under this key is about another connection */
		if (users) {
			count(COUNT_USERS_FULL);
			connects_of_users.delete(key);
		} else if (key->local) {
			count(OVERFLOW_CONNECTS);
			connects.delete(key);
		} else {
			count(OVERFLOW_CONNECTS);
			connects_behind.delete(key);
		}
		return;
	}
	count(COUNT_CONNECTS);
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

static inline void on_established(struct bpf_sock_ops *ops, struct hopgate_connect_key *key)
{
	struct hopgate_connect_record *record = find_record(key, bpf_get_socket_cookie(ops));

	if (record)
		record->flags |= CONNECT_ESTABLISHED;
}

static inline void on_close(struct bpf_sock_ops *ops, struct hopgate_connect_key *key)
{
	u64 cookie = bpf_get_socket_cookie(ops);
	struct hopgate_connect_record *record = find_record(key, cookie);

	unwatched.delete(&cookie);
	if (!record)
		return;
	if (record->flags & CONNECT_ESTABLISHED) {
		record->time_ns = bpf_ktime_get_ns();
		record->flags |= CONNECT_CLOSED;
	} else if (key->local) {
		connects.delete(key);
	} else {
		struct hopgate_connect_record *behind = connects_behind.lookup(key);

		if (behind && behind->socket == cookie)
			connects_behind.delete(key);
		else
			connects_of_users.delete(key);
	}
}

int on_sock_ops(struct bpf_sock_ops *ops)
{
	u32 zero = 0;

	if (ops->op != BPF_SOCK_OPS_TCP_CONNECT_CB && ops->op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB &&
	    !(ops->op == BPF_SOCK_OPS_STATE_CB && ops->args[1] == BPF_TCP_CLOSE))
		return 1;

	struct hopgate_connect_key key = {};
	struct hopgate_config *config = settings.lookup(&zero);

	if (!config || !read_key(ops, &key))
		return 1;
	if (ops->op == BPF_SOCK_OPS_TCP_CONNECT_CB) {
		on_connect(ops, &key, config);
		return 1;
	}
	/* whatever has a record or passes wants to hear of its states, unless another program forgot that for us */
	if (!(ops->bpf_sock_ops_cb_flags & BPF_SOCK_OPS_STATE_CB_FLAG) && !in_scope(&key))
		return 1;
	key.local = bpf_get_netns_cookie(ops) == config->netns;
	has_passed(ops, config->mark);
	if (ops->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB)
		on_established(ops, &key);
	else
		on_close(ops, &key);
	return 1;
}

/* Matched by the rules (xt_bpf): is this from a socket of an exempt image that connects? */
int on_exempt(struct __sk_buff *skb)
{
	u64 cookie = bpf_get_socket_cookie(skb);

	return passing.lookup(&cookie) != 0;
}
