/*
 * How fast durable commits of bodies go into the embedded store: random
 * overwrites, with the commits one after another.
 *
 *   store_commit DIRECTORY [BODY_BYTES [COMMIT_MIB [COMMITS [KEYS]]]]
 */
#include "../tests/unit/store_test.h"
#include "measure.h"

int main(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: %s DIRECTORY [BODY_BYTES [COMMIT_MIB [COMMITS [KEYS]]]]\n",
                argv[0]);
        return 2;
    }
    size_t body = argc > 2 ? strtoull(argv[2], NULL, 0) : 16384;
    size_t per = ((argc > 3 ? strtoull(argv[3], NULL, 0) : 64) << 20) / body;
    int commits = argc > 4 ? atoi(argv[4]) : 32;
    uint64_t keys = argc > 5 ? strtoull(argv[5], NULL, 0) : (2ull << 30) / body;
    if (per == 0)
        per = 1;
    struct test_store t = {0};
    test_store_begin(&t, argv[1]);
    uint8_t *data = mem_alloc(body * 64);
    struct chance state = {1};
    for (size_t i = 0; i < body * 64 / 8; i++)
        put_le64(data + 8 * i, chance_u64(&state));
    struct store_mutation *m = mem_zalloc(per * sizeof *m);
    uint8_t *names = mem_alloc(per * 24), head[16] = {0};
    double worst = 0, total = 0, cpu = cpu_s();
    for (int c = 0; c < commits; c++) {
        uint64_t at = chance_u64(&state) % keys;
        for (size_t i = 0; i < per; i++) {
            /* In rising order with random gaps, as a generation is sealed. */
            at = (at + 1 + chance_u64(&state) % (2 * keys / per + 1)) % keys;
            uint8_t *k = names + 24 * i;
            memcpy(k, "block-of-volume-", 16);
            put_be64(k + 16, at);
            m[i] = (struct store_mutation){
                STORE_SET, {k, 24}, {head, 16}, {data + body * (i % 64), body}};
        }
        double t0 = now_s();
        enum status st = test_commit(&t, NULL, 0, m, per);
        double took = now_s() - t0;
        if (st) {
            fprintf(stderr, "commit %d: %s\n", c, status_text(st));
            return 1;
        }
        total += took;
        worst = took > worst ? took : worst;
    }
    cpu = cpu_s() - cpu;
    double mib = (double)per * (double)body * commits / (1 << 20);
    printf("%zu B bodies, %zu per commit: %.0f MiB/s, %.1f ms per commit (worst %.1f), %.2f CPU s "
           "per GiB\n",
           body, per, mib / total, total / commits * 1e3, worst * 1e3, cpu / (mib / 1024));
    struct store_info info;
    struct err e;
    if (store_info(t.store, &info, &e) == ST_OK)
        printf("store: %.0f MiB used, %.0f MiB free\n", (double)info.bytes_used / (1 << 20),
               (double)info.bytes_free / (1 << 20));
    test_store_end(&t);
    return 0;
}
