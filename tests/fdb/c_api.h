/*
 * The part of FoundationDB's C API that is doubled, as of API version 730: written down here,
 * as the real headers are on no machine that builds this. A test that loads a library takes
 * the types of its functions from these.
 */
#ifndef TESTS_FDB_C_API_H
#define TESTS_FDB_C_API_H

#include <stdint.h>

typedef int fdb_error_t;
typedef int fdb_bool_t;
typedef struct FDB_future FDBFuture;
typedef struct FDB_database FDBDatabase;
typedef struct FDB_transaction FDBTransaction;
typedef void (*FDBCallback)(FDBFuture *future, void *arg);

#pragma pack(push, 4)
typedef struct {
    const uint8_t *key;
    int key_length;
} FDBKey;
typedef struct {
    const uint8_t *key;
    int key_length;
    const uint8_t *value;
    int value_length;
} FDBKeyValue;
#pragma pack(pop)

fdb_error_t fdb_select_api_version_impl(int runtime_version, int header_version);
int fdb_get_max_api_version(void);
const char *fdb_get_client_version(void);
const char *fdb_get_error(fdb_error_t code);
fdb_bool_t fdb_error_predicate(int predicate, fdb_error_t code);
fdb_error_t fdb_network_set_option(int option, const uint8_t *value, int value_len);
fdb_error_t fdb_setup_network(void);
fdb_error_t fdb_run_network(void);
fdb_error_t fdb_stop_network(void);
fdb_error_t fdb_create_database(const char *cluster_file, FDBDatabase **out);
void fdb_database_destroy(FDBDatabase *db);
double fdb_database_get_main_thread_busyness(FDBDatabase *db);
FDBFuture *fdb_database_get_server_protocol(FDBDatabase *db, uint64_t expected);
fdb_error_t fdb_database_create_transaction(FDBDatabase *db, FDBTransaction **out);
fdb_error_t fdb_database_set_option(FDBDatabase *db, int option, const uint8_t *value,
                                    int value_len);
void fdb_transaction_destroy(FDBTransaction *t);
void fdb_transaction_cancel(FDBTransaction *t);
void fdb_transaction_reset(FDBTransaction *t);
fdb_error_t fdb_transaction_set_option(FDBTransaction *t, int option, const uint8_t *value,
                                       int value_len);
void fdb_transaction_set_read_version(FDBTransaction *t, int64_t version);
FDBFuture *fdb_transaction_get_read_version(FDBTransaction *t);
FDBFuture *fdb_transaction_get(FDBTransaction *t, const uint8_t *key, int key_len,
                               fdb_bool_t snapshot);
FDBFuture *fdb_transaction_get_range(FDBTransaction *t, const uint8_t *begin_key, int begin_len,
                                     fdb_bool_t begin_or_equal, int begin_offset,
                                     const uint8_t *end_key, int end_len, fdb_bool_t end_or_equal,
                                     int end_offset, int limit, int target_bytes, int mode,
                                     int iteration, fdb_bool_t snapshot, fdb_bool_t reverse);
FDBFuture *fdb_transaction_watch(FDBTransaction *t, const uint8_t *key, int key_len);
FDBFuture *fdb_transaction_get_estimated_range_size_bytes(FDBTransaction *t,
                                                          const uint8_t *begin_key, int begin_len,
                                                          const uint8_t *end_key, int end_len);
FDBFuture *fdb_transaction_get_range_split_points(FDBTransaction *t, const uint8_t *begin_key,
                                                  int begin_len, const uint8_t *end_key,
                                                  int end_len, int64_t chunk_bytes);
FDBFuture *fdb_transaction_get_approximate_size(FDBTransaction *t);
void fdb_transaction_set(FDBTransaction *t, const uint8_t *key, int key_len, const uint8_t *value,
                         int value_len);
void fdb_transaction_atomic_op(FDBTransaction *t, const uint8_t *key, int key_len,
                               const uint8_t *param, int param_len, int type);
void fdb_transaction_clear(FDBTransaction *t, const uint8_t *key, int key_len);
void fdb_transaction_clear_range(FDBTransaction *t, const uint8_t *begin_key, int begin_len,
                                 const uint8_t *end_key, int end_len);
fdb_error_t fdb_transaction_add_conflict_range(FDBTransaction *t, const uint8_t *begin_key,
                                               int begin_len, const uint8_t *end_key, int end_len,
                                               int type);
FDBFuture *fdb_transaction_commit(FDBTransaction *t);
fdb_error_t fdb_transaction_get_committed_version(FDBTransaction *t, int64_t *version);
FDBFuture *fdb_transaction_on_error(FDBTransaction *t, fdb_error_t code);
void fdb_future_destroy(FDBFuture *f);
void fdb_future_cancel(FDBFuture *f);
void fdb_future_release_memory(FDBFuture *f);
fdb_bool_t fdb_future_is_ready(FDBFuture *f);
fdb_error_t fdb_future_block_until_ready(FDBFuture *f);
fdb_error_t fdb_future_set_callback(FDBFuture *f, FDBCallback callback, void *arg);
fdb_error_t fdb_future_get_error(FDBFuture *f);
fdb_error_t fdb_future_get_int64(FDBFuture *f, int64_t *out);
fdb_error_t fdb_future_get_uint64(FDBFuture *f, uint64_t *out);
fdb_error_t fdb_future_get_value(FDBFuture *f, fdb_bool_t *present, const uint8_t **value,
                                 int *value_len);
fdb_error_t fdb_future_get_keyvalue_array(FDBFuture *f, const FDBKeyValue **pairs, int *n,
                                          fdb_bool_t *more);
fdb_error_t fdb_future_get_key_array(FDBFuture *f, const FDBKey **keys, int *n);

#endif
