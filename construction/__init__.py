"""From raw pictures to a data set: one stage a file, and `build`, which runs them in their order.

    sources      pictures of persons, from AG-ReID, G2APS or a table of one's own
    quality      measure each picture; which are broken, blurry, too small, too dark, or repeated
    balance      as many aerial as ground pictures of an identity, and which of them are pairs
    splits       persons to train, val and test
    attributes   labels from annotations, views, models; votes
    captions     ask a model for captions, or write them by a grammar; check them; CLIP's filter
    writing      TBAGPR's layout or `custom`, the manifest
    card         the data card

A stage is a function of records (records.py) and of its part of the recipe (recipe.py). It knows
neither the table on disk (table.py) nor the other stages, so it can be replaced.

What is cheap is computed anew in every run. What costs time or money (measures, answers of models,
features) is kept by its content (store.py). So a run that was killed goes on where it was, and a
changed recipe repeats only what it changes.
"""
