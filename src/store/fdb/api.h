/*
 * FoundationDB's C API as far as this program uses it, found at run time.
 *
 * The library is loaded with dlopen, so that one binary serves users with and
 * without it and building needs nothing that distributions do not carry. The
 * declarations follow FoundationDB's documentation of its C API, versions 630 to
 * 740, in which none of these functions differs.
 *
 * One network thread per process runs everything inside the library; it can't be
 * started again once it was stopped (its documentation says), so it goes on until
 * the process ends.
 */
#ifndef STORE_FDB_API_H
#define STORE_FDB_API_H

#include <stdint.h>

#include "base/status.h"

#define FDB_API_VERSION_MIN 630
#define FDB_API_VERSION_MAX 740

typedef struct fdb_future FDBFuture;
typedef struct fdb_database FDBDatabase;
typedef struct fdb_transaction FDBTransaction;

#pragma pack(push, 4)
struct fdb_key_value {
    const uint8_t *key;
    int key_length;
    const uint8_t *value;
    int value_length;
};
#pragma pack(pop)

enum fdb_error {
    FDB_TIMED_OUT = 1004,
    FDB_DATABASE_LOCKED = 1038,
    FDB_FILE_NOT_READABLE = 1513,
    FDB_NO_CLUSTER_FILE = 1515,
    FDB_CALL_REFUSED_FIRST = 2000, /* what the library refuses before it sends anything */
    FDB_USED_DURING_COMMIT = 2017,
    FDB_TRANSACTION_TOO_LARGE = 2101,
    FDB_CONNECTION_STRING_INVALID = 2104,
    FDB_CALL_REFUSED_LAST = 2199,
};

enum fdb_transaction_option {
    FDB_TR_NEXT_WRITE_NO_WRITE_CONFLICT_RANGE = 30,
    FDB_TR_READ_YOUR_WRITES_DISABLE = 51,
    FDB_TR_PRIORITY_BATCH = 201,
    FDB_TR_READ_PRIORITY_LOW = 510, /* since 7.2; older ones refuse it */
    FDB_TR_AUTO_THROTTLE_TAG = 801,
};

enum { FDB_STREAMING_WANT_ALL = -2, FDB_STREAMING_EXACT = 0 };
enum { FDB_CONFLICT_READ = 0 };
enum { FDB_PREDICATE_RETRYABLE = 50000, FDB_PREDICATE_RETRYABLE_NOT_COMMITTED = 50002 };

/* The functions, under the names the library gives them less their "fdb_". Those in the
 * second list may be missing (NULL) in older libraries. */
#define FDB_FUNCTIONS(F)                                                                           \
    F(int, select_api_version_impl, (int runtime_version, int header_version))                     \
    F(int, get_max_api_version, (void))                                                            \
    F(const char *, get_client_version, (void))                                                    \
    F(const char *, get_error, (int code))                                                         \
    F(int, error_predicate, (int predicate, int code))                                             \
    F(int, setup_network, (void))                                                                  \
    F(int, run_network, (void))                                                                    \
    F(int, stop_network, (void))                                                                   \
    F(int, create_database, (const char *cluster_file, FDBDatabase **out))                         \
    F(void, database_destroy, (FDBDatabase * db))                                                  \
    F(int, database_create_transaction, (FDBDatabase * db, FDBTransaction * *out))                 \
    F(void, transaction_destroy, (FDBTransaction * tr))                                            \
    F(void, transaction_cancel, (FDBTransaction * tr))                                             \
    F(void, transaction_reset, (FDBTransaction * tr))                                              \
    F(int, transaction_set_option,                                                                 \
      (FDBTransaction * tr, int option, const uint8_t *value, int value_length))                   \
    F(void, transaction_set_read_version, (FDBTransaction * tr, int64_t version))                  \
    F(FDBFuture *, transaction_get_read_version, (FDBTransaction * tr))                            \
    F(FDBFuture *, transaction_get,                                                                \
      (FDBTransaction * tr, const uint8_t *key, int key_length, int snapshot))                     \
    F(FDBFuture *, transaction_get_range,                                                          \
      (FDBTransaction * tr, const uint8_t *begin, int begin_length, int begin_or_equal,            \
       int begin_offset, const uint8_t *end, int end_length, int end_or_equal, int end_offset,     \
       int limit, int target_bytes, int mode, int iteration, int snapshot, int reverse))           \
    F(void, transaction_set,                                                                       \
      (FDBTransaction * tr, const uint8_t *key, int key_length, const uint8_t *value,              \
       int value_length))                                                                          \
    F(void, transaction_clear, (FDBTransaction * tr, const uint8_t *key, int key_length))          \
    F(void, transaction_clear_range,                                                               \
      (FDBTransaction * tr, const uint8_t *begin, int begin_length, const uint8_t *end,            \
       int end_length))                                                                            \
    F(int, transaction_add_conflict_range,                                                         \
      (FDBTransaction * tr, const uint8_t *begin, int begin_length, const uint8_t *end,            \
       int end_length, int type))                                                                  \
    F(FDBFuture *, transaction_commit, (FDBTransaction * tr))                                      \
    F(int, transaction_get_committed_version, (FDBTransaction * tr, int64_t * version))            \
    F(FDBFuture *, transaction_watch, (FDBTransaction * tr, const uint8_t *key, int key_length))   \
    F(FDBFuture *, transaction_on_error, (FDBTransaction * tr, int code))                          \
    F(void, future_destroy, (FDBFuture * future))                                                  \
    F(void, future_cancel, (FDBFuture * future))                                                   \
    F(int, future_set_callback,                                                                    \
      (FDBFuture * future, void (*callback)(FDBFuture *, void *), void *arg))                      \
    F(int, future_get_error, (FDBFuture * future))                                                 \
    F(int, future_get_int64, (FDBFuture * future, int64_t * out))                                  \
    F(int, future_get_value,                                                                       \
      (FDBFuture * future, int *present, const uint8_t **value, int *value_length))                \
    F(int, future_get_keyvalue_array,                                                              \
      (FDBFuture * future, const struct fdb_key_value **out, int *count, int *more))

#define FDB_FUNCTIONS_OPTIONAL(F)                                                                  \
    F(FDBFuture *, transaction_get_estimated_range_size_bytes,                                     \
      (FDBTransaction * tr, const uint8_t *begin, int begin_length, const uint8_t *end,            \
       int end_length))                                                                            \
    F(FDBFuture *, database_get_server_protocol, (FDBDatabase * db, uint64_t expected_version))    \
    F(int, future_get_uint64, (FDBFuture * future, uint64_t * out))                                \
    F(double, database_get_main_thread_busyness, (FDBDatabase * db))

struct fdb_api {
#define FDB_MEMBER(type, name, args) type(*name) args;
    FDB_FUNCTIONS(FDB_MEMBER)
    FDB_FUNCTIONS_OPTIONAL(FDB_MEMBER)
#undef FDB_MEMBER
    int version;             /* the API version selected */
    char client[64];         /* the library's own version, "7.3.79" */
    uint64_t protocol;       /* what it speaks with a cluster; 0: not known */
};

/* Filled by fdb_api_start(). */
extern struct fdb_api fdb;

/* Loads the library, selects an API version and starts the network thread; once per process,
 * later calls give the same answer. FDB_NBD_LIBFDB_C in the environment names the library
 * where it is not found by itself. ST_UNAVAIL with a sentence. Any thread. */
enum status fdb_api_start(struct err *e);

/* Ends the network thread for good; all databases are closed. Before exit(), which takes the
 * library apart under a thread that still runs. */
void fdb_api_stop(void);

#endif
