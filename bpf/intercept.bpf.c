// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/*
 * Finds databases where no target is. Connections out of scope, of processes below an agent that the policy intercepts,
 * are looked at until it is known what each side begins with:
 *
 *   watch       sock_ops, at connect: below such an agent? Then the socket gets a storage, before its SYN is sent
 *   on_egress   cgroup_skb: the first bytes of the client …
 *   on_ingress  … and of the server, in the order of the stream, whatever segments they come in
 *
 * The segment that completes a match is dropped, and from then on every segment with data; those without pass, so that
 * the connection can be ended. The host agent is told once a connection, and says whether the policy means this image
 * after all: agents are recognised here by their file alone, which is too many rather than too few. What it spares
 * passes when it is sent again.
 *
 * A segment that leaves a gap before it is dropped while its side is looked at: it comes again. When both sides began
 * with nothing that is looked for, the storage goes, and a segment costs one look-up.
 *
 * These programs are attached only while the policy asks for them.
 *
 * Blind spots: connections older than the attachment have no storage; bytes that the sender's program changes between
 * this look and the network card (splice, MSG_ZEROCOPY), which the server's side may still show; what is inside IPsec;
 * TLS whose first record does not offer a database's protocol (ALPN) within what TLS_STEPS reads.
 */

BPF_TABLE_PINNED("hash", struct hopgate_file_key, u32, agent_files, AGENT_FILES_MAX, PINS "/agent_files",
		 BPF_F_NO_PREALLOC);
BPF_TABLE_PINNED("sk_storage", int, struct hopgate_watch, watches, 0, PINS "/watches", BPF_F_NO_PREALLOC);
BPF_TABLE_PINNED("hash", u64, u64, unwatched, UNWATCHED_MAX, PINS "/unwatched", BPF_F_NO_PREALLOC);

/* Images above the one that connects that are looked through: below more of them everybody is looked at. */
#define WATCH_LEVELS 64

#define IPPROTO_TCP 6
#define IPV6_EXTENSIONS 8	/* headers between that of IPv6 and that of TCP */
#define TCP_SYN 0x02

#define NOTHING 0xff	/* no protocol that is looked for begins like this; 0 while it still may */
#define TLS_HELLO 0xfe	/* a ClientHello of TLS, which may offer one */

#define TLS_STEPS 160	/* bytes of a ClientHello that are read of one segment; the rest is skipped */
#define TLS_SESSION 43	/* where in the stream the length of the session id is */
#define TLS_ALPN 16
#define ALPN_POSTGRESQL 0x737467726573716cull
#define ALPN_TDS 0x7464732f382e30ull

/* --- who is looked at --------------------------------------------------------------------------------------------- */

static inline bool may_be_agent(u64 id)
{
	if (id && spared.lookup(&id))
		return false;
	for (int level = 0; level < WATCH_LEVELS; level++) {
		struct hopgate_node *node = nodes.lookup(&id);

		/* without a lineage nobody can say that there is no agent */
		if (!node || declared.lookup(&id))
			return true;
		struct hopgate_file_key file = {.inode = node->inode, .device = node->device};

		if (agent_files.lookup(&file))
			return true;
		id = node->parent;
		if (!id)
			return false;
	}
	return true;
}

static inline void tell(struct hopgate_watch *watch, u32 type, u32 detail)
{
	struct hopgate_event event = {.type = type, .detail = detail};

	event.node = watch->node;
	event.netns = watch->netns;
	event.socket = watch->socket;
	event.tgid = watch->tgid;
	__builtin_memcpy(event.source, watch->key.source, sizeof(event.source));
	__builtin_memcpy(event.dest, watch->key.dest, sizeof(event.dest));
	event.source_port = watch->key.source_port;
	event.dest_port = watch->key.dest_port;
	event.family = watch->key.family;
	emit(&event);
}

/* At connect, before the SYN. A socket may connect more than once: what was seen of it before is forgotten. */
static inline void watch(struct bpf_sock_ops *ops, struct hopgate_connect_key *key, struct hopgate_config *config,
			 u64 netns, u64 node, u32 tgid)
{
	struct bpf_sock *sk = ops->sk;
	u64 cookie = bpf_get_socket_cookie(ops);

	if (!may_be_agent(node))
		return;

	struct hopgate_watch *watch = sk ? watches.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE) : 0;

	if (watch) {
		__builtin_memset(watch, 0, sizeof(*watch));
		watch->epoch = config->intercept;
		watch->node = node;
		watch->netns = netns;
		watch->socket = cookie;
		watch->tgid = tgid;
		watch->key = *key;
		return;
	}
	/* whoever fills a socket's memory with filters and options leaves no room for the storage */
	struct hopgate_watch told = {.node = node, .netns = netns, .socket = cookie, .tgid = tgid, .key = *key};

	if (unwatched.update(&cookie, &node))
		count(COUNT_UNCLOSED);
	count(COUNT_UNWATCHED);
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	tell(&told, EVENT_UNWATCHED, 0);
}

/* The socket goes where it is not looked at, or closes. */
static inline void unwatch(struct bpf_sock_ops *ops)
{
	struct bpf_sock *sk = ops->sk;
	u64 cookie = bpf_get_socket_cookie(ops);

	if (sk)
		watches.sk_storage_delete(sk);
	unwatched.delete(&cookie);
}

/* --- what a segment holds ----------------------------------------------------------------------------------------- */

struct segment {
	u32 sequence;	/* of the first byte of data */
	u32 data;	/* where it is in the packet */
	u32 length;
	bool syn;
};

enum kind { SEGMENT, NO_TCP, UNREADABLE };

static inline enum kind read_segment(struct __sk_buff *skb, struct segment *segment)
{
	u8 head[40];
	u8 tcp[20];
	u8 protocol;
	u32 at;

	if (bpf_skb_load_bytes(skb, 0, head, 20))
		return NO_TCP;
	if (head[0] >> 4 == 4) {
		at = (head[0] & 15) * 4;
		protocol = head[9];
	} else {
		at = 40;
		protocol = head[6];
		for (int header = 0; header < IPV6_EXTENSIONS; header++) {
			/* hop-by-hop, routing, fragment, destination options; authentication counts in words */
			if (protocol != 0 && protocol != 43 && protocol != 44 && protocol != 60 && protocol != 51)
				break;
			if (bpf_skb_load_bytes(skb, at, head, 2))
				return UNREADABLE;
			at += protocol == 51 ? (head[1] + 2) * 4 : protocol == 44 ? 8 : (head[1] + 1) * 8;
			protocol = head[0];
		}
		if (protocol == 0 || protocol == 43 || protocol == 44 || protocol == 60 || protocol == 51)
			return UNREADABLE;
	}
	if (protocol != IPPROTO_TCP)
		return NO_TCP;
	if (bpf_skb_load_bytes(skb, at, tcp, sizeof(tcp)))
		return UNREADABLE;
	segment->syn = tcp[13] & TCP_SYN;
	segment->sequence = (u32)tcp[4] << 24 | (u32)tcp[5] << 16 | (u32)tcp[6] << 8 | tcp[7];
	segment->sequence += segment->syn;
	segment->data = at + (tcp[12] >> 4) * 4;
	segment->length = skb->len > segment->data ? skb->len - segment->data : 0;
	return SEGMENT;
}

/* --- what it begins with ------------------------------------------------------------------------------------------ */

/* True of a byte that has not come yet. */
#define MAY(index, condition) (n <= (index) || (condition))

static inline bool is_digit(u8 byte)
{
	return byte >= '0' && byte <= '9';
}

/* A sign, digits and CR LF from head[1] on: 0 no, 1 so far, 2 yes. */
static inline u32 number_line(u8 *head, u32 n)
{
	u32 digits = 0;
	bool ends = false;

	for (u32 index = 1; index < 12; index++) {
		if (n <= index)
			return 1;
		u8 byte = head[index];

		if (ends)
			return byte == '\n' ? 2 : 0;
		if (byte == '\r' && digits)
			ends = true;
		else if (is_digit(byte))
			digits++;
		else if (byte != '-' || index != 1)
			return 0;
	}
	return 0;
}

static inline u32 judge_client(u8 *head, u32 n)
{
	bool may = false;

	/* PostgreSQL: length, code; what is no request of eight bytes goes on with the name of a parameter */
	if (MAY(0, !head[0]) && MAY(1, !head[1]) && MAY(3, head[2] <= 0x27 && (head[2] || head[3] >= 8))) {
		if (MAY(4, head[4] == 0x04) && MAY(5, head[5] == 0xd2) && MAY(6, head[6] == 0x16) &&
		    MAY(7, head[7] >= 0x2e && head[7] <= 0x30)) {
			if (n > 7)
				return PROTOCOL_POSTGRESQL;
			may = true;
		}
		if (MAY(4, !head[4]) && MAY(5, head[5] == 3) && MAY(8, head[8])) {
			if (n > 8)
				return PROTOCOL_POSTGRESQL;
			may = true;
		}
		if (MAY(2, head[2] == 1) && MAY(3, head[3] == 0x28) && MAY(4, !head[4]) && MAY(5, head[5] == 2) &&
		    MAY(6, !head[6]) && MAY(7, !head[7])) {
			if (n > 7)
				return PROTOCOL_POSTGRESQL;
			may = true;
		}
	}
	/* TDS: a prelogin whose first option is the version, or a login of the length of its packet */
	if (MAY(0, head[0] == 0x12) && MAY(1, head[1] <= 1) && MAY(8, !head[8]) && MAY(11, !head[11]) &&
	    MAY(12, head[12] == 6)) {
		if (n > 12)
			return PROTOCOL_TDS;
		may = true;
	}
	if (MAY(0, head[0] == 0x10) && MAY(1, head[1] <= 1) && MAY(10, !head[10]) && MAY(11, !head[11]) &&
	    MAY(9, ((u32)head[9] << 8 | head[8]) + 8 == ((u32)head[2] << 8 | head[3])) && MAY(15, head[15] >> 3 == 0x0e)) {
		if (n > 15)
			return PROTOCOL_TDS;
		may = true;
	}
	/* MongoDB: length, two numbers, an operation from 2001 to 2013 */
	if (MAY(3, head[3] <= 2) && MAY(12, head[12] >= 0xd1 && head[12] <= 0xdd) && MAY(13, head[13] == 7) &&
	    MAY(14, !head[14]) && MAY(15, !head[15])) {
		if (n > 15)
			return PROTOCOL_MONGODB;
		may = true;
	}
	/* Oracle: a connect packet with two versions from 300 to 319 */
	if (MAY(0, head[0] < 0x40) && MAY(4, head[4] == 1) && MAY(8, head[8] == 1) &&
	    MAY(9, head[9] >= 0x2c && head[9] <= 0x3f) && MAY(10, head[10] == 1) &&
	    MAY(11, head[11] >= 0x2c && head[11] <= 0x3f)) {
		if (n > 11)
			return PROTOCOL_ORACLE;
		may = true;
	}
	if (head[0] == '*') {
		u32 found = number_line(head, n);

		if (found == 2)
			return PROTOCOL_REDIS;
		may |= found;
	}
	if (may)
		return 0;
	if (MAY(0, head[0] == 0x16) && MAY(1, head[1] == 3) && MAY(5, head[5] == 1))
		return n > 5 ? TLS_HELLO : 0;
	return NOTHING;
}

enum { HELLO_SESSION = 1, HELLO_CIPHERS, HELLO_COMPRESSION, HELLO_EXTENSION, HELLO_NAME_LENGTH, HELLO_NAME };

/*
 * Walks on through a ClientHello (RFC 8446, 4.1.2) to the protocols that it offers (RFC 7301). Returns a protocol, 0
 * while more has to come, or NOTHING. What lies beyond the first record is not walked through.
 */
static inline u32 walk_hello(struct __sk_buff *skb, struct segment *segment, u32 start, u32 record,
			     struct hopgate_hello *hello)
{
	u32 end = start + segment->length;

	for (int step = 0; step < TLS_STEPS; step++) {
		u32 at = hello->at;
		u8 byte = 0;

		if (at >= record)
			return NOTHING;
		if ((s32)(end - at) <= 0)
			return 0;
		if (bpf_skb_load_bytes(skb, segment->data + (at - start), &byte, 1))
			return NOTHING;
		hello->number = hello->number << 8 | byte;
		hello->at = ++at;
		if (--hello->need)
			continue;

		u64 number = hello->number;
		u32 length = number & 0xffff;

		hello->number = 0;
		switch (hello->stage) {
		case HELLO_SESSION:
			hello->at = at + length;
			hello->need = 2;
			hello->stage = HELLO_CIPHERS;
			break;
		case HELLO_CIPHERS:
			hello->at = at + length;
			hello->need = 1;
			hello->stage = HELLO_COMPRESSION;
			break;
		case HELLO_COMPRESSION:
			/* and the length of all extensions */
			hello->at = at + length + 2;
			hello->need = 4;
			hello->stage = HELLO_EXTENSION;
			break;
		case HELLO_EXTENSION:
			if (number >> 16 != TLS_ALPN) {
				hello->at = at + length;
				hello->need = 4;
				break;
			}
			/* and the length of the list */
			hello->at = at + 2;
			hello->left = length;
			hello->need = 1;
			hello->stage = HELLO_NAME_LENGTH;
			break;
		case HELLO_NAME_LENGTH:
			if (!length || length + 3 > hello->left)
				return NOTHING;
			hello->left -= length + 1;
			if (length == 10 || length == 7) {
				hello->need = length;
				hello->stage = HELLO_NAME;
			} else {
				hello->at = at + length;
				hello->need = 1;
			}
			break;
		default:
			/* of a name of ten bytes the last eight are left */
			if (number == ALPN_POSTGRESQL)
				return PROTOCOL_POSTGRESQL;
			if (number == ALPN_TDS)
				return PROTOCOL_TDS;
			hello->need = 1;
			hello->stage = HELLO_NAME_LENGTH;
		}
	}
	return NOTHING;
}

/* An authentication request of PostgreSQL from head[at] on, or TLS after its S. */
static inline u32 judge_answer(u8 *head, u32 n, u32 at)
{
	if (MAY(at, head[at] == 'R') && MAY(at + 1, !head[at + 1]) && MAY(at + 2, !head[at + 2]) &&
	    MAY(at + 3, !head[at + 3]) && MAY(at + 4, head[at + 4] >= 8) && MAY(at + 5, !head[at + 5]) &&
	    MAY(at + 6, !head[at + 6]) && MAY(at + 7, !head[at + 7]) && MAY(at + 8, head[at + 8] < 16))
		return n > at + 8 ? PROTOCOL_POSTGRESQL : 0;
	if (MAY(at, head[at] == 'S') && MAY(at + 1, head[at + 1] == 0x16) && MAY(at + 2, head[at + 2] == 3))
		return n > at + 2 ? PROTOCOL_POSTGRESQL : 0;
	return NOTHING;
}

static inline u32 judge_server(u8 *head, u32 n, bool asked)
{
	u32 found;

	/* MySQL: length below 64 KiB, number 0, protocol 10, the digits of a version */
	if (MAY(2, !head[2]) && MAY(3, !head[3]) && MAY(4, head[4] == 10) && MAY(5, is_digit(head[5])) &&
	    MAY(6, is_digit(head[6]) || head[6] == '.'))
		return n > 6 ? PROTOCOL_MYSQL : 0;

	/* PostgreSQL refuses encryptions, each with an N, before it asks for a password */
	if (head[0] != 'N')
		found = judge_answer(head, n, 0);
	else if (n < 2)
		found = 0;
	else if (head[1] != 'N')
		found = judge_answer(head, n, 1);
	else
		found = judge_answer(head, n, 2);
	if (found != NOTHING)
		return found;

	/* Redis, also to commands in plain words, which nothing tells; a mail server greets before it is asked */
	if (head[0] == '$' || head[0] == '*' || head[0] == ':' || head[0] == '%') {
		found = number_line(head, n);
		return found == 2 ? PROTOCOL_REDIS : found == 1 ? 0 : NOTHING;
	}
	if (asked && head[0] == '+') {
		if (MAY(1, head[1] == 'O') && MAY(2, head[2] == 'K') && MAY(3, head[3] == '\r') && MAY(4, head[4] == '\n'))
			return n > 4 ? PROTOCOL_REDIS : 0;
		if (MAY(1, head[1] == 'P') && MAY(2, head[2] == 'O') && MAY(3, head[3] == 'N') && MAY(4, head[4] == 'G'))
			return n > 4 ? PROTOCOL_REDIS : 0;
	}
	if (asked && head[0] == '-' && MAY(1, head[1] == 'N') && MAY(2, head[2] == 'O') && MAY(3, head[3] == 'A') &&
	    MAY(4, head[4] == 'U') && MAY(5, head[5] == 'T') && MAY(6, head[6] == 'H'))
		return n > 6 ? PROTOCOL_REDIS : 0;
	return NOTHING;
}

/* --- the programs ------------------------------------------------------------------------------------------------- */

/* Takes what the segment adds to the beginning of its side; false when it leaves a gap. */
static inline bool collect(struct __sk_buff *skb, struct segment *segment, struct hopgate_stream *stream)
{
	if (segment->syn || !stream->begun) {
		stream->first = segment->sequence;
		stream->begun = 1;
	}
	u32 have = stream->have;
	/* where in the stream the segment begins; "negative" where it repeats what came before the first byte */
	u32 start = segment->sequence - stream->first;
	u32 ahead = start - have;

	if (segment->length && (s32)ahead > 0)
		return false;
	for (u32 index = 0; index < STREAM_HEAD; index++) {
		if (index < have)
			continue;
		if (index - start >= segment->length)
			break;
		if (bpf_skb_load_bytes(skb, segment->data + (index - start), &stream->head[index], 1))
			return false;
		have = index + 1;
	}
	stream->have = have;
	return true;
}

static inline int look(struct __sk_buff *skb, bool sent)
{
	struct segment segment = {};
	struct bpf_sock *sk = skb->sk;
	u32 zero = 0;

	if (!sk)
		return 1;
	sk = bpf_sk_fullsock(sk);
	if (!sk)
		return 1;

	struct hopgate_watch *watch = watches.sk_storage_get(sk, 0, 0);

	if (!watch) {
		u32 which = COUNT_UNWATCHED;
		u64 *times = counters.lookup(&which);

		if (!times || !*times)
			return 1;
		u64 cookie = bpf_get_socket_cookie(skb);

		u64 *node = unwatched.lookup(&cookie);

		if (!node || (*node && spared.lookup(node)))
			return 1;
		return read_segment(skb, &segment) == SEGMENT && !segment.length;
	}
	struct hopgate_stream *stream = sent ? &watch->sent : &watch->received;

	if (stream->done && !watch->found)
		return 1;

	struct hopgate_config *config = settings.lookup(&zero);

	/* seen in part only, when these programs were taken off in between */
	if (!config || watch->epoch != config->intercept)
		return 1;
	switch (read_segment(skb, &segment)) {
	case NO_TCP:
		return 1;
	case UNREADABLE:
		return 0;
	case SEGMENT:
		break;
	}
	if (watch->found) {
		if (!segment.length)
			return 1;
		u64 node = watch->node;

		if (!node || !spared.lookup(&node))
			return 0;
		watches.sk_storage_delete(sk);
		return 1;
	}
	u32 found = 0;

	if (!sent || !watch->hello.stage) {
		if (!collect(skb, &segment, stream))
			return 0;
		if (!segment.length)
			return 1;
		found = sent ? judge_client(stream->head, stream->have) :
			       judge_server(stream->head, stream->have, watch->sent.have);
		if (found == TLS_HELLO) {
			watch->hello.at = TLS_SESSION;
			watch->hello.next = stream->have;
			watch->hello.need = 1;
			watch->hello.stage = HELLO_SESSION;
		}
	}
	if (sent && watch->hello.stage) {
		u32 start = segment.sequence - stream->first;
		u32 end = start + segment.length;

		if (!segment.length)
			return 1;
		if ((s32)(start - watch->hello.next) > 0)
			return 0;
		if ((s32)(end - watch->hello.next) > 0)
			watch->hello.next = end;
		found = walk_hello(skb, &segment, start, 5 + ((u32)stream->head[3] << 8 | stream->head[4]), &watch->hello);
	}
	if (!found)
		return 1;
	if (found == NOTHING) {
		stream->done = 1;
		if (watch->sent.done && watch->received.done)
			watches.sk_storage_delete(sk);
		return 1;
	}
	watch->found = found;
	count(COUNT_HIDDEN);
	tell(watch, EVENT_HIDDEN, found);
	return 0;
}

int on_egress(struct __sk_buff *skb)
{
	return look(skb, true);
}

int on_ingress(struct __sk_buff *skb)
{
	return look(skb, false);
}
