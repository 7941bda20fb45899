/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the kernel's part costs those who connect and start processes.
 *
 *   connects serve PORT...                     accepts on these ports, and closes at once
 *   connects connect ADDRESS PORT COUNT MANY   COUNT connections each by MANY processes: JSON with times of connect() and
 *                                              connections a second of all together
 *   connects spawn COUNT                       forks, executes itself, and waits, so many times: JSON with times
 *   connects relay ADDRESS PORT DEPTH          re-executes itself DEPTH times; then, for each line on standard input:
 *                                              `N`: starts a process that re-executes itself N times and connects
 *                                              `+N`: becomes a relay that is N images deeper
 *   connects orphan ADDRESS PORT               a relay that is a child of init, or of the nearest subreaper
 *   connects chain ADDRESS PORT DEPTH          one of its processes
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BACKLOG 4096

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static long now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000L + time.tv_nsec;
}

static int compare(const void *one, const void *other)
{
	long a = *(const long *)one, b = *(const long *)other;

	return (a > b) - (a < b);
}

static void tell(long *took, long count, long whole_ns)
{
	qsort(took, count, sizeof(*took), compare);
	printf("{\"p50_us\": %.3f, \"p99_us\": %.3f, \"rate\": %.1f}\n", took[count / 2] / 1e3, took[count * 99 / 100] / 1e3,
	       count * 1e9 / whole_ns);
}

static long *shared_times(long count)
{
	long *took = mmap(NULL, count * sizeof(*took), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (took == MAP_FAILED)
		fail("mmap");
	/* not while it is measured */
	memset(took, 1, count * sizeof(*took));
	return took;
}

static void serve(const char *port)
{
	struct sockaddr_in6 here = {.sin6_family = AF_INET6, .sin6_port = htons(atoi(port))};
	int on = 1, off = 0, fd = socket(AF_INET6, SOCK_STREAM, 0);
	pid_t parent = getpid();

	/* the one before may not be quite gone */
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &on, sizeof(on));
	setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
	if (bind(fd, (void *)&here, sizeof(here)) || listen(fd, BACKLOG))
		fail(port);
	if (fork())
		return;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(0);
	for (;;)
		close(accept(fd, NULL, NULL));
}

static struct sockaddr_in address_of(char **argv)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[3]))};

	if (inet_pton(AF_INET, argv[2], &to.sin_addr) != 1)
		fail(argv[2]);
	return to;
}

/* Resets when it closes, so that no port is kept. */
static int connected(const struct sockaddr_in *to, long *took)
{
	struct linger reset = {1, 0};
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	long start;

	setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
	start = now_ns();
	if (connect(fd, (const void *)to, sizeof(*to)))
		fail("connect");
	*took = now_ns() - start;
	return fd;
}

static int measure_connects(char **argv)
{
	struct sockaddr_in to = address_of(argv);
	long count = atol(argv[4]), many = atol(argv[5]), start, once;
	long *took = shared_times(count * many);
	int status, failed = 0, gate[2];

	if (pipe(gate))
		fail("pipe");
	for (long process = 0; process < many; process++) {
		if (fork())
			continue;
		char byte;

		close(gate[1]);
		/* all begin when the gate is closed */
		if (read(gate[0], &byte, 1))
			_exit(1);
		for (long index = 0; index < count; index++)
			close(connected(&to, &took[process * count + index]));
		_exit(0);
	}
	/* one that is not counted: what is made once is made */
	close(connected(&to, &once));
	start = now_ns();
	close(gate[1]);
	while (wait(&status) > 0)
		failed |= status;
	tell(took, count * many, now_ns() - start);
	return failed != 0;
}

static int measure_spawns(char **argv)
{
	long count = atol(argv[2]), *took = shared_times(count), whole = now_ns();
	int status, failed = 0;

	for (long index = 0; index < count; index++) {
		long start = now_ns();
		pid_t child = fork();

		if (!child) {
			execl("/proc/self/exe", "connects", NULL);
			_exit(1);
		}
		waitpid(child, &status, 0);
		took[index] = now_ns() - start;
		failed |= status;
	}
	tell(took, count, now_ns() - whole);
	return failed != 0;
}

static void again(char **argv, const char *verb, long depth)
{
	char number[32];

	snprintf(number, sizeof(number), "%ld", depth);
	execl("/proc/self/exe", "connects", verb, argv[2], argv[3], number, NULL);
	fail("execl");
}

static int relay(char **argv)
{
	char line[32];

	/* unbuffered: what stands behind `+N` is for the next image */
	setvbuf(stdin, NULL, _IONBF, 0);
	while (fgets(line, sizeof(line), stdin)) {
		if (line[0] == '+')
			again(argv, "relay", atol(line + 1) - 1);
		if (!fork())
			again(argv, "chain", atol(line) - 1);
		wait(NULL);
	}
	return 0;
}

int main(int argc, char **argv)
{
	const char *verb = argc > 1 ? argv[1] : "";
	long depth = argc == 5 ? atol(argv[4]) : 0;

	if (argc < 2)
		return 0;
	if (!strcmp(verb, "serve")) {
		for (int index = 2; index < argc; index++)
			serve(argv[index]);
		puts("ready");
		fflush(stdout);
		pause();
	} else if (!strcmp(verb, "connect") && argc == 6) {
		return measure_connects(argv);
	} else if (!strcmp(verb, "spawn") && argc == 3) {
		return measure_spawns(argv);
	} else if (!strcmp(verb, "orphan") && argc == 4) {
		pid_t parent = getpid();

		if (fork())
			return 0;
		setsid();
		while (getppid() == parent)
			usleep(1000);
		puts("ready");
		fflush(stdout);
		return relay(argv);
	} else if (!strcmp(verb, "relay") && argc == 5) {
		if (depth > 0)
			again(argv, "relay", depth - 1);
		return relay(argv);
	} else if (!strcmp(verb, "chain") && argc == 5) {
		struct sockaddr_in to = address_of(argv);
		char byte;

		if (depth > 0)
			again(argv, "chain", depth - 1);
		/* until it was looked at */
		return read(connected(&to, &depth), &byte, 1) > 0;
	}
	return 2;
}
