"""Search one's own pictures and videos for a person, by a sentence or a picture.

    records    what is known of a person in a picture: one row of a table
    ingest     folders, boxes, data sets and videos to files with the people in them
    frames     files to people as bytes
    detect     the people in a frame, by a detector
    encode     people to features and attributes, by a run or by vanilla weights
    onnx       the same without torch, by what tools/export.py --onnx wrote
    engine_*   reading and encoding side by side, with torch and without
    plan       what a run has to encode
    indexing   encoded people to parts of the gallery, as they become ready
    store      the gallery's folder: what is kept, and how a second run changes it
    manifest   its encoder, attributes and parts
    parts      the files of a part
    paths      files as the gallery names them
    moved      a gallery whose root has changed
    where      the grammar of filters
    index      nearest features, by FAISS
    milvus     the same in a collection of Milvus
    copies     copies of a gallery in Milvus, and how they are made equal to it
    encoders   the encoder that asks a gallery
    query      sentences and pictures to hits
    rerank     the first hits ranked again
    hits_table hits as a table
    pictures   the picture of a hit: a file or a frame, and the box in it
    heatmap    why this one: where in a picture a sentence is seen
    sheet      hits as a picture or a page
    page*      the search page: its components, what they do, their HTML, its server, and what a
               visitor asks
    service    a gallery as the page asks it
    sent       a picture that a visitor of the page sends
    find       the command that asks
    commands_* the other commands of search.py

Nothing here trains; of `processor` it uses `inference` alone.
"""
