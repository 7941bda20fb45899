// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/*
 * Tells whose sockets write below TCP: these programs stop nothing.
 *
 *   sock_create    on the cgroup: a raw IP socket is made. The rules catch what it sends, and cannot say whose it is
 *   net_dev_queue  a frame of a packet socket is handed to a device, in the context of who sends it. No rule sees it
 *
 * Of each image and kind one is told, and of each kind no more than TOLD_PER_S in a second, however much is forked. What
 * the maps hold may be lost: then something is told once more.
 *
 * Blind spots: PACKET_QDISC_BYPASS and AF_XDP go past the tracepoint (hostagent/raw_sockets.py looks for the sockets).
 * A raw ICMP socket, which everybody's ping has, can write any header. A frame with a VLAN tag or with IPv6 extension
 * headers, and the rest of a fragmented datagram, is told as one to nowhere.
 */

#define SOCK_RAW 3
#define AF_PACKET 17
#define IPPROTO_ICMP 1
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_ICMPV6 58

/* `iptables` makes such a socket each time that it meets an address set, also for us. The reader takes 400 a second. */
#define TOLD_PER_S 64
#define NS_PER_S 1000000000ull

struct told_key {
	u64 who;	/* node, or the tgid of who has none */
	u64 kind;	/* SENT_… */
};

struct told_window {
	u64 begin_ns;
	u64 told;
};

BPF_TABLE("lru_hash", struct told_key, u64, told, 4096);
BPF_TABLE("array", u32, struct told_window, windows, 4);

/* Whether the image has not been told of yet, and there is room in this second. Two at once may both be told. */
static inline bool first_time(u64 who, u32 kind)
{
	struct told_key key = {.who = who, .kind = kind};
	struct told_window *window = windows.lookup(&kind);
	u64 now = bpf_ktime_get_ns();

	if (!window || told.lookup(&key))
		return false;
	if (now - window->begin_ns > NS_PER_S) {
		window->begin_ns = now;
		window->told = 0;
	}
	if (window->told >= TOLD_PER_S) {
		count(COUNT_RAW_UNTOLD);
		return false;
	}
	window->told++;
	told.update(&key, &now);
	return true;
}

static inline void tell_sent(struct hopgate_event *event, u32 kind)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();

	event->tgid = KREAD(task_struct, task, tgid);

	u64 *own = procs.lookup(&event->tgid);

	event->node = own ? *own : 0;
	if (!first_time(event->node ? event->node : event->tgid, kind))
		return;
	event->type = EVENT_SENT_RAW;
	event->detail = kind;
	emit(event);
}

int on_sock_create(struct bpf_sock *sk)
{
	struct hopgate_event event = {};

	if (sk->type != SOCK_RAW || sk->protocol == IPPROTO_ICMP || sk->protocol == IPPROTO_ICMPV6)
		return 1;
	event.netns = bpf_get_netns_cookie(sk);
	tell_sent(&event, SENT_RAW_IP);
	return 1;
}

/* Whether the frame is TCP or UDP over IP; if so, its addresses and ports. */
static inline bool read_frame(struct sk_buff *skb, struct hopgate_connect_key *key)
{
	u32 start = KREAD(sk_buff, skb, network_header), end = KREAD(sk_buff, skb, tail), skipped;
	u64 at = (u64)KREAD(sk_buff, skb, head) + start;
	u8 ip[40] = {};
	u16 ports[2] = {};
	u8 protocol;

	bpf_probe_read_kernel(ip, sizeof(ip), (void *)at);
	if (ip[0] >> 4 == 4) {
		if ((ip[6] & 0x1f) | ip[7])
			return false;
		key->family = FAMILY_4;
		__builtin_memcpy(key->source, ip + 12, 4);
		__builtin_memcpy(key->dest, ip + 16, 4);
		protocol = ip[9];
		skipped = (ip[0] & 15) * 4;
	} else if (ip[0] >> 4 == 6) {
		key->family = FAMILY_6;
		__builtin_memcpy(key->source, ip + 8, 16);
		__builtin_memcpy(key->dest, ip + 24, 16);
		protocol = ip[6];
		skipped = 40;
	} else {
		return false;
	}
	if (protocol != IPPROTO_TCP && protocol != IPPROTO_UDP)
		return false;
	/* behind a short frame lies what an earlier one left */
	if (end < start + skipped + sizeof(ports))
		return false;
	bpf_probe_read_kernel(ports, sizeof(ports), (void *)(at + skipped));
	key->source_port = bpf_ntohs(ports[0]);
	key->dest_port = bpf_ntohs(ports[1]);
	return true;
}

/* raw_tp net_dev_queue(struct sk_buff *skb) */
int on_queue(struct bpf_raw_tracepoint_args *ctx)
{
	struct sk_buff *skb = (struct sk_buff *)ctx->args[0];
	struct sock *sk = KREAD(sk_buff, skb, sk);

	if (!sk || KREAD(sock, sk, __sk_common.skc_family) != AF_PACKET)
		return 0;

	struct hopgate_connect_key key = {};
	struct hopgate_event event = {};
	struct net *net = KREAD(sock, sk, __sk_common.skc_net.net);
	u32 kind = SENT_FRAME;

	event.netns = KREAD(net, net, net_cookie);
	if (read_frame(skb, &key)) {
		event.family = key.family;
		event.source_port = key.source_port;
		event.dest_port = key.dest_port;
		__builtin_memcpy(event.source, key.source, sizeof(event.source));
		__builtin_memcpy(event.dest, key.dest, sizeof(event.dest));
		if (in_scope(&key))
			kind = SENT_FRAME_IN_SCOPE;
	}
	tell_sent(&event, kind);
	return 0;
}
