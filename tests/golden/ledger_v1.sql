BEGIN TRANSACTION;
CREATE TABLE attempts (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    task INTEGER NOT NULL REFERENCES tasks (number),
    worker TEXT NOT NULL,
    lease_s REAL NOT NULL,
    started_at TEXT NOT NULL,
    ended_at TEXT,
    ended_as TEXT CHECK (ended_as IN ('result', 'failed', 'lost', 'released', 'overtaken', 'forgiven')),
    error TEXT,
    CHECK ((ended_at IS NULL) = (ended_as IS NULL))
);
INSERT INTO "attempts" VALUES(1,1,'host-0',60.0,'2026-01-01T00:00:00+00:00','2026-01-01T00:00:00+00:00','result',NULL);
INSERT INTO "attempts" VALUES(2,2,'host-1',60.0,'2026-01-01T00:00:00+00:00','2026-01-01T00:00:00+00:00','failed','ValueError: no');
INSERT INTO "attempts" VALUES(3,3,'host-2',60.0,'2026-01-01T00:00:00+00:00',NULL,NULL,NULL);
INSERT INTO "attempts" VALUES(4,4,'host-3',60.0,'2026-01-01T00:00:00+00:00','2026-01-01T00:00:00+00:00','released',NULL);
CREATE TABLE cells (
    number INTEGER PRIMARY KEY,
    task INTEGER NOT NULL REFERENCES tasks (number),
    digest BLOB NOT NULL,
    phase TEXT NOT NULL,
    output_dir TEXT NOT NULL,
    spelled TEXT NOT NULL,
    position INTEGER NOT NULL,
    active INTEGER NOT NULL DEFAULT 1 CHECK (active IN (0, 1)),
    UNIQUE (task, digest)
);
INSERT INTO "cells" VALUES(1,1,X'D8A58FC0CEEB6BD537385ACD','p','out','{"dataset":"digits","model_type":"lr","width_factor":2,"depth":1,"poison_ratio":0.0,"poison_type":"label_flip","poison_level":"sample","target_class":null,"poison_label":null,"alpha":1.0,"partition":"dirichlet_class","min_client_size":10,"data_ordering":"shuffle","aggregator":"fedavg","batch_size":32,"num_clients":2,"fraction_fit":1.0,"global_rounds":10,"local_epochs":1,"lr":0.02,"momentum":0.9,"weight_decay":0.0005,"max_grad_norm":1.0,"validation_split":0.1,"early_stopping_patience":10,"min_delta":0.0,"partition_seed":null,"split_seed":null,"seed":1}',1,1);
INSERT INTO "cells" VALUES(2,2,X'4439B34FC3369B175351E766','p','out','{"dataset":"digits","model_type":"lr","width_factor":2,"depth":1,"poison_ratio":0.0,"poison_type":"label_flip","poison_level":"sample","target_class":null,"poison_label":null,"alpha":1.0,"partition":"dirichlet_class","min_client_size":10,"data_ordering":"shuffle","aggregator":"fedavg","batch_size":32,"num_clients":2,"fraction_fit":1.0,"global_rounds":10,"local_epochs":1,"lr":0.02,"momentum":0.9,"weight_decay":0.0005,"max_grad_norm":1.0,"validation_split":0.1,"early_stopping_patience":10,"min_delta":0.0,"partition_seed":null,"split_seed":null,"seed":2}',2,1);
INSERT INTO "cells" VALUES(3,3,X'FC64E1EE8B011F46616E121C','p','out','{"dataset":"digits","model_type":"lr","width_factor":2,"depth":1,"poison_ratio":0.5,"poison_type":"label_flip","poison_level":"sample","target_class":null,"poison_label":null,"alpha":1.0,"partition":"dirichlet_class","min_client_size":10,"data_ordering":"shuffle","aggregator":"fedavg","batch_size":32,"num_clients":2,"fraction_fit":1.0,"global_rounds":10,"local_epochs":1,"lr":0.02,"momentum":0.9,"weight_decay":0.0005,"max_grad_norm":1.0,"validation_split":0.1,"early_stopping_patience":10,"min_delta":0.0,"partition_seed":null,"split_seed":null,"seed":1}',3,1);
INSERT INTO "cells" VALUES(4,4,X'B23789E7F348F29A660F067B','p','out','{"dataset":"digits","model_type":"lr","width_factor":2,"depth":1,"poison_ratio":0.5,"poison_type":"label_flip","poison_level":"sample","target_class":null,"poison_label":null,"alpha":1.0,"partition":"dirichlet_class","min_client_size":10,"data_ordering":"shuffle","aggregator":"fedavg","batch_size":32,"num_clients":2,"fraction_fit":1.0,"global_rounds":10,"local_epochs":1,"lr":0.02,"momentum":0.9,"weight_decay":0.0005,"max_grad_norm":1.0,"validation_split":0.1,"early_stopping_patience":10,"min_delta":0.0,"partition_seed":null,"split_seed":null,"seed":2}',4,1);
INSERT INTO "cells" VALUES(5,5,X'82A971A464F61582C1DDF9DF','p','out','{"dataset":"digits","model_type":"lr","width_factor":4,"depth":1,"poison_ratio":0.0,"poison_type":"label_flip","poison_level":"sample","target_class":null,"poison_label":null,"alpha":1.0,"partition":"dirichlet_class","min_client_size":10,"data_ordering":"shuffle","aggregator":"fedavg","batch_size":32,"num_clients":2,"fraction_fit":1.0,"global_rounds":10,"local_epochs":1,"lr":0.02,"momentum":0.9,"weight_decay":0.0005,"max_grad_norm":1.0,"validation_split":0.1,"early_stopping_patience":10,"min_delta":0.0,"partition_seed":null,"split_seed":null,"seed":1}',5,1);
INSERT INTO "cells" VALUES(6,6,X'460B4B8A20654E1F86908BD6','p','out','{"dataset":"digits","model_type":"lr","width_factor":4,"depth":1,"poison_ratio":0.0,"poison_type":"label_flip","poison_level":"sample","target_class":null,"poison_label":null,"alpha":1.0,"partition":"dirichlet_class","min_client_size":10,"data_ordering":"shuffle","aggregator":"fedavg","batch_size":32,"num_clients":2,"fraction_fit":1.0,"global_rounds":10,"local_epochs":1,"lr":0.02,"momentum":0.9,"weight_decay":0.0005,"max_grad_norm":1.0,"validation_split":0.1,"early_stopping_patience":10,"min_delta":0.0,"partition_seed":null,"split_seed":null,"seed":2}',6,1);
INSERT INTO "cells" VALUES(7,7,X'65DE81563746984B47FC834F','p','out','{"dataset":"digits","model_type":"lr","width_factor":4,"depth":1,"poison_ratio":0.5,"poison_type":"label_flip","poison_level":"sample","target_class":null,"poison_label":null,"alpha":1.0,"partition":"dirichlet_class","min_client_size":10,"data_ordering":"shuffle","aggregator":"fedavg","batch_size":32,"num_clients":2,"fraction_fit":1.0,"global_rounds":10,"local_epochs":1,"lr":0.02,"momentum":0.9,"weight_decay":0.0005,"max_grad_norm":1.0,"validation_split":0.1,"early_stopping_patience":10,"min_delta":0.0,"partition_seed":null,"split_seed":null,"seed":1}',7,1);
INSERT INTO "cells" VALUES(8,8,X'EF4D46EFC39C40853AD073F1','p','out','{"dataset":"digits","model_type":"lr","width_factor":4,"depth":1,"poison_ratio":0.5,"poison_type":"label_flip","poison_level":"sample","target_class":null,"poison_label":null,"alpha":1.0,"partition":"dirichlet_class","min_client_size":10,"data_ordering":"shuffle","aggregator":"fedavg","batch_size":32,"num_clients":2,"fraction_fit":1.0,"global_rounds":10,"local_epochs":1,"lr":0.02,"momentum":0.9,"weight_decay":0.0005,"max_grad_norm":1.0,"validation_split":0.1,"early_stopping_patience":10,"min_delta":0.0,"partition_seed":null,"split_seed":null,"seed":2}',8,1);
INSERT INTO "cells" VALUES(9,9,X'32D0628FF5A80DC732C326E9','q','out','{"dataset":"digits","model_type":"lr","width_factor":2,"depth":0,"poison_ratio":0.0,"poison_type":"label_flip","poison_level":"sample","target_class":null,"poison_label":null,"alpha":1.0,"partition":"dirichlet_class","min_client_size":10,"data_ordering":"shuffle","aggregator":"fedavg","batch_size":32,"num_clients":2,"fraction_fit":1.0,"global_rounds":10,"local_epochs":1,"lr":0.02,"momentum":0.9,"weight_decay":0.0005,"max_grad_norm":1.0,"validation_split":0.1,"early_stopping_patience":10,"min_delta":0.0,"partition_seed":null,"split_seed":null,"seed":1}',9,1);
INSERT INTO "cells" VALUES(10,9,X'8D78855AE26B6B0EA034F399','q','out','{"dataset":"digits","model_type":"lr","width_factor":4,"depth":0,"poison_ratio":0.0,"poison_type":"label_flip","poison_level":"sample","target_class":null,"poison_label":null,"alpha":1.0,"partition":"dirichlet_class","min_client_size":10,"data_ordering":"shuffle","aggregator":"fedavg","batch_size":32,"num_clients":2,"fraction_fit":1.0,"global_rounds":10,"local_epochs":1,"lr":0.02,"momentum":0.9,"weight_decay":0.0005,"max_grad_norm":1.0,"validation_split":0.1,"early_stopping_patience":10,"min_delta":0.0,"partition_seed":null,"split_seed":null,"seed":1}',10,1);
INSERT INTO "cells" VALUES(11,10,X'CA58ABC1979820555F908535','q','out','{"dataset":"digits","model_type":"lr","width_factor":2,"depth":0,"poison_ratio":0.0,"poison_type":"label_flip","poison_level":"sample","target_class":null,"poison_label":null,"alpha":1.0,"partition":"dirichlet_class","min_client_size":10,"data_ordering":"shuffle","aggregator":"fedavg","batch_size":32,"num_clients":2,"fraction_fit":1.0,"global_rounds":10,"local_epochs":1,"lr":0.02,"momentum":0.9,"weight_decay":0.0005,"max_grad_norm":1.0,"validation_split":0.1,"early_stopping_patience":10,"min_delta":0.0,"partition_seed":null,"split_seed":null,"seed":2}',11,1);
INSERT INTO "cells" VALUES(12,10,X'5881DB92B88BBC40F7774057','q','out','{"dataset":"digits","model_type":"lr","width_factor":4,"depth":0,"poison_ratio":0.0,"poison_type":"label_flip","poison_level":"sample","target_class":null,"poison_label":null,"alpha":1.0,"partition":"dirichlet_class","min_client_size":10,"data_ordering":"shuffle","aggregator":"fedavg","batch_size":32,"num_clients":2,"fraction_fit":1.0,"global_rounds":10,"local_epochs":1,"lr":0.02,"momentum":0.9,"weight_decay":0.0005,"max_grad_norm":1.0,"validation_split":0.1,"early_stopping_patience":10,"min_delta":0.0,"partition_seed":null,"split_seed":null,"seed":2}',12,1);
CREATE TABLE conflicts (
    number INTEGER PRIMARY KEY,
    task INTEGER NOT NULL REFERENCES tasks (number),
    attempt INTEGER,
    worker TEXT,
    received_at TEXT NOT NULL,
    data TEXT NOT NULL
);
CREATE TABLE counts (
    status TEXT NOT NULL,
    orphaned INTEGER NOT NULL,
    diverged INTEGER NOT NULL,
    amount INTEGER NOT NULL,
    PRIMARY KEY (status, orphaned, diverged)
) WITHOUT ROWID;
INSERT INTO "counts" VALUES('assigned',0,0,1);
INSERT INTO "counts" VALUES('complete',0,0,1);
INSERT INTO "counts" VALUES('pending',0,0,8);
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
INSERT INTO "meta" VALUES('ledger_id','b67efd3f');
INSERT INTO "meta" VALUES('plan_digest','digest of version 1');
CREATE TABLE output_dirs (
    path TEXT PRIMARY KEY,
    varying TEXT NOT NULL,
    active INTEGER NOT NULL CHECK (active IN (0, 1))
) WITHOUT ROWID;
INSERT INTO "output_dirs" VALUES('out','["depth","poison_ratio","seed","width_factor"]',1);
CREATE TABLE results (
    number INTEGER PRIMARY KEY,
    task INTEGER NOT NULL UNIQUE REFERENCES tasks (number),
    attempt INTEGER,
    worker TEXT,
    source TEXT,
    received_at TEXT NOT NULL,
    wall_time_s REAL,
    data TEXT NOT NULL,
    history TEXT
);
INSERT INTO "results" VALUES(1,1,1,'host-0',NULL,'2026-01-01T00:00:00+00:00',NULL,'{"mean_test_acc":0.03913521766662598,"mean_test_loss":0.3333333333333333,"mean_val_acc":0.1,"mean_val_loss":2.5,"outcome":"ok","num_parameters":33,"best_epoch":2,"device":"cpu"}','[{"round": 1, "val_loss": 1.0, "val_acc": 0.03913521766662598, "nonfinite_clients": 0}, {"round": 2, "val_loss": 0.5, "val_acc": 0.03913521766662598, "nonfinite_clients": 0}]');
CREATE TABLE tasks (
    number INTEGER PRIMARY KEY,
    signature TEXT NOT NULL UNIQUE,
    task_id TEXT NOT NULL UNIQUE,
    phase TEXT NOT NULL,
    output_dir TEXT NOT NULL,
    seed INTEGER NOT NULL,
    experiment TEXT NOT NULL,
    options TEXT NOT NULL,
    match_key TEXT NOT NULL,
    cohort TEXT NOT NULL,
    position INTEGER NOT NULL,
    orphaned INTEGER NOT NULL DEFAULT 0 CHECK (orphaned IN (0, 1)),
    status TEXT NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'assigned', 'complete', 'failed')),
    diverged INTEGER NOT NULL DEFAULT 0 CHECK (diverged IN (0, 1)),
    attempt INTEGER,
    failures INTEGER NOT NULL DEFAULT 0 CHECK (failures >= 0),
    losses INTEGER NOT NULL DEFAULT 0 CHECK (losses >= 0),
    setbacks INTEGER NOT NULL DEFAULT 0,
    last_error TEXT,
    CHECK ((status = 'assigned') = (attempt IS NOT NULL))
);
INSERT INTO "tasks" VALUES(1,'digits|lr|2|1|0.0|none|1.0|shuffle|fedavg|32|1|340fdc0a04c4','p_0_1','p','out',1,'{"dataset":"digits","model_type":"lr","width_factor":2,"depth":1,"poison_ratio":0.0,"poison_type":"label_flip","poison_level":"sample","target_class":null,"poison_label":null,"alpha":1.0,"partition":"dirichlet_class","min_client_size":10,"data_ordering":"shuffle","aggregator":"fedavg","batch_size":32,"num_clients":2,"fraction_fit":1.0,"global_rounds":10,"local_epochs":1,"lr":0.02,"momentum":0.9,"weight_decay":0.0005,"max_grad_norm":1.0,"validation_split":0.1,"early_stopping_patience":10,"min_delta":0.0,"partition_seed":null,"split_seed":null,"seed":1}','{"output_dir":"out","project_name":"fedsweep","num_parallel_workers":1,"optimizer":"sgd","device":"auto","load_to_memory":true}','digits|lr|1|0.0|fedavg|32|1','digits|lr|2|1|32|1|2',0,0,'complete',0,NULL,0,0,0,NULL);
INSERT INTO "tasks" VALUES(2,'digits|lr|2|1|0.0|none|1.0|shuffle|fedavg|32|2|8086438df651','p_0_2','p','out',2,'{"dataset":"digits","model_type":"lr","width_factor":2,"depth":1,"poison_ratio":0.0,"poison_type":"label_flip","poison_level":"sample","target_class":null,"poison_label":null,"alpha":1.0,"partition":"dirichlet_class","min_client_size":10,"data_ordering":"shuffle","aggregator":"fedavg","batch_size":32,"num_clients":2,"fraction_fit":1.0,"global_rounds":10,"local_epochs":1,"lr":0.02,"momentum":0.9,"weight_decay":0.0005,"max_grad_norm":1.0,"validation_split":0.1,"early_stopping_patience":10,"min_delta":0.0,"partition_seed":null,"split_seed":null,"seed":2}','{"output_dir":"out","project_name":"fedsweep","num_parallel_workers":1,"optimizer":"sgd","device":"auto","load_to_memory":true}','digits|lr|1|0.0|fedavg|32|2','digits|lr|2|1|32|1|2',1,0,'pending',0,NULL,1,0,1,'ValueError: no');
INSERT INTO "tasks" VALUES(3,'digits|lr|2|1|0.5|label_flip|1.0|shuffle|fedavg|32|1|83ea64457e39','p_1_1','p','out',1,'{"dataset":"digits","model_type":"lr","width_factor":2,"depth":1,"poison_ratio":0.5,"poison_type":"label_flip","poison_level":"sample","target_class":null,"poison_label":null,"alpha":1.0,"partition":"dirichlet_class","min_client_size":10,"data_ordering":"shuffle","aggregator":"fedavg","batch_size":32,"num_clients":2,"fraction_fit":1.0,"global_rounds":10,"local_epochs":1,"lr":0.02,"momentum":0.9,"weight_decay":0.0005,"max_grad_norm":1.0,"validation_split":0.1,"early_stopping_patience":10,"min_delta":0.0,"partition_seed":null,"split_seed":null,"seed":1}','{"output_dir":"out","project_name":"fedsweep","num_parallel_workers":1,"optimizer":"sgd","device":"auto","load_to_memory":true}','digits|lr|1|0.5|fedavg|32|1','digits|lr|2|1|32|1|2',2,0,'assigned',0,3,0,0,0,NULL);
INSERT INTO "tasks" VALUES(4,'digits|lr|2|1|0.5|label_flip|1.0|shuffle|fedavg|32|2|9a8b54dadf24','p_1_2','p','out',2,'{"dataset":"digits","model_type":"lr","width_factor":2,"depth":1,"poison_ratio":0.5,"poison_type":"label_flip","poison_level":"sample","target_class":null,"poison_label":null,"alpha":1.0,"partition":"dirichlet_class","min_client_size":10,"data_ordering":"shuffle","aggregator":"fedavg","batch_size":32,"num_clients":2,"fraction_fit":1.0,"global_rounds":10,"local_epochs":1,"lr":0.02,"momentum":0.9,"weight_decay":0.0005,"max_grad_norm":1.0,"validation_split":0.1,"early_stopping_patience":10,"min_delta":0.0,"partition_seed":null,"split_seed":null,"seed":2}','{"output_dir":"out","project_name":"fedsweep","num_parallel_workers":1,"optimizer":"sgd","device":"auto","load_to_memory":true}','digits|lr|1|0.5|fedavg|32|2','digits|lr|2|1|32|1|2',3,0,'pending',0,NULL,0,0,0,NULL);
INSERT INTO "tasks" VALUES(5,'digits|lr|4|1|0.0|none|1.0|shuffle|fedavg|32|1|72977860d665','p_2_1','p','out',1,'{"dataset":"digits","model_type":"lr","width_factor":4,"depth":1,"poison_ratio":0.0,"poison_type":"label_flip","poison_level":"sample","target_class":null,"poison_label":null,"alpha":1.0,"partition":"dirichlet_class","min_client_size":10,"data_ordering":"shuffle","aggregator":"fedavg","batch_size":32,"num_clients":2,"fraction_fit":1.0,"global_rounds":10,"local_epochs":1,"lr":0.02,"momentum":0.9,"weight_decay":0.0005,"max_grad_norm":1.0,"validation_split":0.1,"early_stopping_patience":10,"min_delta":0.0,"partition_seed":null,"split_seed":null,"seed":1}','{"output_dir":"out","project_name":"fedsweep","num_parallel_workers":1,"optimizer":"sgd","device":"auto","load_to_memory":true}','digits|lr|1|0.0|fedavg|32|1','digits|lr|4|1|32|1|2',4,0,'pending',0,NULL,0,0,0,NULL);
INSERT INTO "tasks" VALUES(6,'digits|lr|4|1|0.0|none|1.0|shuffle|fedavg|32|2|66affb500d76','p_2_2','p','out',2,'{"dataset":"digits","model_type":"lr","width_factor":4,"depth":1,"poison_ratio":0.0,"poison_type":"label_flip","poison_level":"sample","target_class":null,"poison_label":null,"alpha":1.0,"partition":"dirichlet_class","min_client_size":10,"data_ordering":"shuffle","aggregator":"fedavg","batch_size":32,"num_clients":2,"fraction_fit":1.0,"global_rounds":10,"local_epochs":1,"lr":0.02,"momentum":0.9,"weight_decay":0.0005,"max_grad_norm":1.0,"validation_split":0.1,"early_stopping_patience":10,"min_delta":0.0,"partition_seed":null,"split_seed":null,"seed":2}','{"output_dir":"out","project_name":"fedsweep","num_parallel_workers":1,"optimizer":"sgd","device":"auto","load_to_memory":true}','digits|lr|1|0.0|fedavg|32|2','digits|lr|4|1|32|1|2',5,0,'pending',0,NULL,0,0,0,NULL);
INSERT INTO "tasks" VALUES(7,'digits|lr|4|1|0.5|label_flip|1.0|shuffle|fedavg|32|1|ed776797c5cb','p_3_1','p','out',1,'{"dataset":"digits","model_type":"lr","width_factor":4,"depth":1,"poison_ratio":0.5,"poison_type":"label_flip","poison_level":"sample","target_class":null,"poison_label":null,"alpha":1.0,"partition":"dirichlet_class","min_client_size":10,"data_ordering":"shuffle","aggregator":"fedavg","batch_size":32,"num_clients":2,"fraction_fit":1.0,"global_rounds":10,"local_epochs":1,"lr":0.02,"momentum":0.9,"weight_decay":0.0005,"max_grad_norm":1.0,"validation_split":0.1,"early_stopping_patience":10,"min_delta":0.0,"partition_seed":null,"split_seed":null,"seed":1}','{"output_dir":"out","project_name":"fedsweep","num_parallel_workers":1,"optimizer":"sgd","device":"auto","load_to_memory":true}','digits|lr|1|0.5|fedavg|32|1','digits|lr|4|1|32|1|2',6,0,'pending',0,NULL,0,0,0,NULL);
INSERT INTO "tasks" VALUES(8,'digits|lr|4|1|0.5|label_flip|1.0|shuffle|fedavg|32|2|5a44deed388b','p_3_2','p','out',2,'{"dataset":"digits","model_type":"lr","width_factor":4,"depth":1,"poison_ratio":0.5,"poison_type":"label_flip","poison_level":"sample","target_class":null,"poison_label":null,"alpha":1.0,"partition":"dirichlet_class","min_client_size":10,"data_ordering":"shuffle","aggregator":"fedavg","batch_size":32,"num_clients":2,"fraction_fit":1.0,"global_rounds":10,"local_epochs":1,"lr":0.02,"momentum":0.9,"weight_decay":0.0005,"max_grad_norm":1.0,"validation_split":0.1,"early_stopping_patience":10,"min_delta":0.0,"partition_seed":null,"split_seed":null,"seed":2}','{"output_dir":"out","project_name":"fedsweep","num_parallel_workers":1,"optimizer":"sgd","device":"auto","load_to_memory":true}','digits|lr|1|0.5|fedavg|32|2','digits|lr|4|1|32|1|2',7,0,'pending',0,NULL,0,0,0,NULL);
INSERT INTO "tasks" VALUES(9,'digits|lr|none|0|0.0|none|1.0|shuffle|fedavg|32|1|2f941cd0293c','q_0_1','q','out',1,'{"dataset":"digits","model_type":"lr","width_factor":2,"depth":0,"poison_ratio":0.0,"poison_type":"label_flip","poison_level":"sample","target_class":null,"poison_label":null,"alpha":1.0,"partition":"dirichlet_class","min_client_size":10,"data_ordering":"shuffle","aggregator":"fedavg","batch_size":32,"num_clients":2,"fraction_fit":1.0,"global_rounds":10,"local_epochs":1,"lr":0.02,"momentum":0.9,"weight_decay":0.0005,"max_grad_norm":1.0,"validation_split":0.1,"early_stopping_patience":10,"min_delta":0.0,"partition_seed":null,"split_seed":null,"seed":1}','{"output_dir":"out","project_name":"fedsweep","num_parallel_workers":1,"optimizer":"sgd","device":"auto","load_to_memory":true}','digits|lr|0|0.0|fedavg|32|1','digits|lr|2|0|32|1|2',8,0,'pending',0,NULL,0,0,0,NULL);
INSERT INTO "tasks" VALUES(10,'digits|lr|none|0|0.0|none|1.0|shuffle|fedavg|32|2|e163a0df14be','q_0_2','q','out',2,'{"dataset":"digits","model_type":"lr","width_factor":2,"depth":0,"poison_ratio":0.0,"poison_type":"label_flip","poison_level":"sample","target_class":null,"poison_label":null,"alpha":1.0,"partition":"dirichlet_class","min_client_size":10,"data_ordering":"shuffle","aggregator":"fedavg","batch_size":32,"num_clients":2,"fraction_fit":1.0,"global_rounds":10,"local_epochs":1,"lr":0.02,"momentum":0.9,"weight_decay":0.0005,"max_grad_norm":1.0,"validation_split":0.1,"early_stopping_patience":10,"min_delta":0.0,"partition_seed":null,"split_seed":null,"seed":2}','{"output_dir":"out","project_name":"fedsweep","num_parallel_workers":1,"optimizer":"sgd","device":"auto","load_to_memory":true}','digits|lr|0|0.0|fedavg|32|2','digits|lr|2|0|32|1|2',9,0,'pending',0,NULL,0,0,0,NULL);
CREATE INDEX queue ON tasks (setbacks, position) WHERE status = 'pending' AND orphaned = 0;
CREATE INDEX cohort_queue ON tasks (cohort, setbacks, position) WHERE status = 'pending' AND orphaned = 0;
CREATE INDEX failed_tasks ON tasks (position) WHERE status = 'failed';
CREATE INDEX tasks_by_position ON tasks (orphaned, position);
CREATE INDEX tasks_by_match_key ON tasks (match_key);
CREATE INDEX cells_by_output_dir ON cells (output_dir, position);
CREATE UNIQUE INDEX one_open_attempt ON attempts (task) WHERE ended_as IS NULL;
CREATE INDEX attempts_by_task ON attempts (task);
CREATE TRIGGER count_changed_task AFTER UPDATE OF status, orphaned, diverged ON tasks
WHEN (old.status, old.orphaned, old.diverged) IS NOT (new.status, new.orphaned, new.diverged) BEGIN
    UPDATE counts SET amount = amount - 1
    WHERE status = old.status AND orphaned = old.orphaned AND diverged = old.diverged;
    INSERT INTO counts VALUES (new.status, new.orphaned, new.diverged, 1)
    ON CONFLICT DO UPDATE SET amount = amount + 1;
END;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('attempts',4);
COMMIT;
