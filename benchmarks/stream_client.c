/* Opens streams of server-sent events and counts their events; a client that costs a server's
   interpreter nothing.

   stream_client PORT STREAMS EVENTS < REQUEST

   Sends the request from stdin on each of STREAMS connections to 127.0.0.1:PORT. Prints how many
   events came, and in how many seconds, between the moment when every stream had had EVENTS / 10 of
   them and the moment when the first had had EVENTS * 9 / 10; then how many streams ended early. */

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { LARGEST_REQUEST = 65536, MOST_STREAMS = 4096, BUFFER = 65536 };

struct stream {
    int socket;
    long events;
    char last;
};

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static int open_stream(int port, const char *request, size_t length) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int opened = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    if (opened < 0 || connect(opened, (struct sockaddr *)&address, sizeof address) < 0)
        fail("connect");
    setsockopt(opened, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (write(opened, request, length) != (ssize_t)length) fail("write");
    usleep(10000); /* so that the server admits them one after the other */
    return opened;
}

/* Counts the events that end in BYTES: an empty line ends one. */
static int count_events(struct stream *stream, const char *bytes, ssize_t length) {
    int events = 0;
    for (ssize_t i = 0; i < length; i++) {
        events += bytes[i] == '\n' && stream->last == '\n';
        stream->last = bytes[i];
    }
    stream->events += events;
    return events;
}

int main(int argc, char **argv) {
    static char request[LARGEST_REQUEST], buffer[BUFFER];
    static struct stream streams[MOST_STREAMS];
    if (argc != 4 || atoi(argv[2]) > MOST_STREAMS) return 2;
    int port = atoi(argv[1]), count = atoi(argv[2]);
    long wanted = atol(argv[3]), begins = wanted / 10, ends = wanted * 9 / 10;
    size_t length = fread(request, 1, sizeof request, stdin);
    int poll = epoll_create1(0), open = count, warming = count, early = 0;
    for (int i = 0; i < count; i++) {
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = &streams[i]};
        streams[i].socket = open_stream(port, request, length);
        if (epoll_ctl(poll, EPOLL_CTL_ADD, streams[i].socket, &event) < 0) fail("epoll_ctl");
    }
    double began = 0, ended = 0;
    long total = 0;
    while (open) {
        struct epoll_event ready[64];
        int number = epoll_wait(poll, ready, 64, 60000);
        if (number <= 0) fail("epoll_wait");
        for (int i = 0; i < number; i++) {
            struct stream *stream = ready[i].data.ptr;
            ssize_t received = read(stream->socket, buffer, sizeof buffer);
            if (received <= 0) {
                early += stream->events < wanted;
                close(stream->socket);
                open--;
                continue;
            }
            if (!stream->events && memcmp(buffer, "HTTP/1.1 200", 12))
                fprintf(stderr, "%.*s\n", (int)received, buffer);
            long before = stream->events;
            int events = count_events(stream, buffer, received);
            if (began && !ended) total += events;
            if (before < begins && stream->events >= begins && !--warming) began = seconds();
            if (began && !ended && stream->events >= ends) ended = seconds();
        }
    }
    printf("%ld %.6f %d\n", total, ended - began, early);
    return 0;
}
